"""All maps of a block fitted together, from the closed form on."""

import math
from dataclasses import replace

import pytest
import torch

import surgery
from surgery.blocks.find import survey
from surgery.blocks.verify import verify_all
from surgery.calibration.arrivals import Arrival, Station
from surgery.closed_form.forms import Affine
from surgery.closed_form.least_squares import UnitPolynomials
from surgery.conversion.recipe import Recipe
from surgery.errors import RecipeError
from surgery.fitting import block as block_module
from surgery.fitting import reconstruction
from surgery.fitting.block import FitSettings, _beginning, fit_block
from surgery.fitting.features import HiddenPolynomial
from surgery.fitting.objective import Aim, Objective
from surgery.fitting.reconstruction import _as_product, _Batch, _batches, reconstructed
from surgery.fitting.target import Target
from tests import tiny

IDS = torch.randint(3, 96, (96, 24), generator=torch.Generator().manual_seed(11))

TOKENS, HELD = 16_000, 2_000


def block_of(name="llama"):
    model = tiny.make(name)
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model, verify_all(model, survey(model).blocks, lambda: model(input_ids=ids))[0]


def inputs(count, width, seed, gaussian=False):
    """Clusters, far from a Gaussian: under one, the closed form is the best of all polynomials as it is."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, width, generator=generator)
    centres = 1.5 * torch.randn(24, width, generator=torch.Generator().manual_seed(99))
    return z if gaussian else centres[torch.randint(24, (count,), generator=generator)] + 0.5 * z


def station_of(name="llama", gaussian=False):
    model, block = block_of(name)
    x = inputs(TOKENS, block.width, 0, gaussian)
    yes, no = torch.ones(TOKENS, dtype=torch.bool), torch.zeros(TOKENS, dtype=torch.bool)
    held = torch.arange(TOKENS) >= TOKENS - HELD
    arrival = Arrival(x, yes, None, x.norm(dim=-1), held, no)
    modules = {path: model.get_submodule(path) for path in block.parts}
    return Station(replace(block, residual=None), modules, (arrival,), ())


def fitted(degree, epochs, name="llama", gaussian=False, **settings):
    station = station_of(name, gaussian)
    with torch.no_grad():
        one = fit_block(station, FitSettings(degree, epochs=epochs, **settings))
        return one, station.block.weights(station.modules)


def missing(one, original, seed=7, gaussian=False):
    """Share of the variance that is not explained, on tokens that no fit has seen."""
    x = inputs(2000, one.polynomial.width, seed, gaussian)
    with torch.no_grad():
        truth, found = original(x), one.polynomial.to(torch.float64)(x.double()).float()
    return float((found - truth).square().sum() / (truth - truth.mean(0)).square().sum())


@pytest.mark.parametrize(("name", "degree"), [("llama", 2), ("llama", 3), ("gpt2", 2), ("gpt2", 3), ("gpt2", 5)])
def test_it_explains_more_of_unseen_inputs_than_the_closed_form(name, degree):
    (before, original), (after, _) = (fitted(degree, epochs, name) for epochs in (0, 8))
    assert after.polynomial.degree == degree
    assert missing(after, original) < 0.85 * missing(before, original)
    assert after.r2_held > before.r2_held


def test_under_a_gaussian_there_is_nothing_to_win():
    """Negative control: there the closed form is optimal among all polynomials of its degree."""
    (before, original), (after, _) = (fitted(2, epochs, gaussian=True) for epochs in (0, 8))
    assert missing(after, original, gaussian=True) > 0.97 * missing(before, original, gaussian=True)


def test_where_held_out_tokens_gain_nothing_the_closed_form_stays(monkeypatch):
    monkeypatch.setattr(reconstruction, "QUADRATIC_RATE", 50.0)
    before, after = (fitted(2, epochs)[0] for epochs in (0, 2))
    assert torch.equal(before.polynomial.gate.weight, after.polynomial.gate.weight)
    assert torch.equal(before.polynomial.down.weight, after.polynomial.down.weight)


def in_batches(station, count):
    """The same tokens in so many batches; the last ones are held out."""
    (whole,) = station.twin
    parts = {name: value.tensor_split(count) for name, value in vars(whole).items() if isinstance(value, torch.Tensor)}
    arrivals = (Arrival(**(vars(whole) | {name: one[n] for name, one in parts.items()})) for n in range(count))
    return replace(station, twin=tuple(arrivals))


def test_descent_begins_from_a_solution_on_some_tokens_and_ends_as_well(monkeypatch):
    station = in_batches(station_of(), 40)
    seen, solve = [], block_module.refit

    def refit(on, *given):
        seen.append(sum(len(arrival.x) for arrival in on.twin))
        return solve(on, *given)

    monkeypatch.setattr(block_module, "refit", refit)
    with torch.no_grad():
        some = fit_block(station, FitSettings(2, epochs=2))
        monkeypatch.setattr(block_module, "BEGINNING", 10**6)
        all_of_them = fit_block(station, FitSettings(2, epochs=2))
    units = len(some.polynomial.a)
    assert HELD + 7 * units <= seen[0] <= HELD + 8 * units + 40
    assert seen[1:] == [TOKENS] * 3
    assert some.r2_held == pytest.approx(all_of_them.r2_held, abs=2e-3)


def test_what_descent_begins_from_has_every_sink_and_no_padding():
    station = in_batches(station_of(), 8)
    padded = [replace(arrival, keep=torch.arange(len(arrival.x)) % 4 != 1) for arrival in station.twin]
    station = replace(station, twin=tuple(padded))
    zero = torch.zeros(len(padded[0].x))
    sink = torch.arange(len(zero)) % 500 == 0
    aims = [Aim(zero[:, None], zero[:, None], zero + 3, sink, sink) for _ in padded]
    some, aim_of = _beginning(station, aims, units=100)
    share = 8 * 100 / (0.75 * TOKENS)
    for number, arrival in enumerate(padded):
        mine, aim = some.twin[number], aim_of(number)
        assert int(aim.sink.sum()) == int(sink.sum())
        assert int(mine.held.sum()) == int(arrival.held.sum())
        fitted = ~mine.held & ~aim.sink
        assert bool(mine.keep[fitted].all())
        there = int((arrival.keep & ~arrival.held & ~sink).sum())
        assert int(fitted.sum()) == math.ceil(share * there)
        assert bool((mine.held.long().diff() >= 0).all()), "held-out rows stay last"
        assert torch.equal(aim.weight[~aim.sink], torch.full_like(aim.weight[~aim.sink], 3))
        assert aim.weight[aim.sink].unique().tolist() == pytest.approx([3 * share])
    assert _beginning(station, aims, units=10_000) is None


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_batch_may_hold_nothing(epochs):
    """Of an expert's tokens a short batch may have none."""
    station = in_batches(station_of(), 3)
    nothing = station.twin[0].at(torch.zeros(0, dtype=torch.long))
    with torch.no_grad():
        found, wanted = (
            fit_block(replace(station, twin=twin), FitSettings(2, epochs=epochs))
            for twin in ((*station.twin, nothing), station.twin)
        )
    assert found.r2_held == pytest.approx(wanted.r2_held, abs=1e-3)


def test_where_descent_gains_nothing_the_closed_form_is_that_of_all_tokens(monkeypatch):
    station = in_batches(station_of(), 40)
    monkeypatch.setattr(block_module, "reconstructed", lambda *_: None)
    with torch.no_grad():
        left, alone = (fit_block(station, FitSettings(2, epochs=epochs)) for epochs in (2, 0))
    assert torch.equal(left.polynomial.down.weight, alone.polynomial.down.weight)


def test_fewer_units_descend_too():
    (before, original), (after, _) = (fitted(2, epochs, units=0.5) for epochs in (0, 8))
    assert len(after.polynomial.a) == len(before.polynomial.a) == tiny.HIDDEN // 2
    assert missing(after, original) < 0.85 * missing(before, original)


def test_a_quadratic_gated_unit_is_the_product_that_it_begins_as():
    one, _ = fitted(2, 0)
    poly = one.polynomial
    units = UnitPolynomials(poly.a, poly.b, torch.ones(len(poly.a)), 1.0)
    hidden, down = _as_product(HiddenPolynomial(poly.gate, poly.up, units), poly.down)
    x = inputs(50, poly.width, 3).double()
    product = down(hidden.gate(x) * hidden.up(x))
    assert torch.allclose(product, poly(x), rtol=1e-9, atol=1e-9)
    assert torch.allclose(down(hidden(x)[:, :-1]), product)


def test_an_epoch_sees_every_token_once():
    nothing = torch.zeros(40, 1)
    batch = _Batch(3, torch.arange(40.0)[:, None], nothing, nothing, torch.arange(5, 36), torch.arange(36, 40))
    for epoch in range(2):
        parts = batch.parts(epoch, 4)
        assert [len(part) for part in parts] == [8, 8, 8, 7]
        seen = torch.cat([batch.at(part)[0][:, 0] for part in parts])
        assert seen.sort().values.tolist() == list(range(5, 36))
    assert not torch.equal(batch.parts(0, 4)[0], batch.parts(1, 4)[0])


def test_massive_tokens_take_no_part_and_those_that_will_be_weigh_more():
    model, block = block_of()
    modules = {path: model.get_submodule(path) for path in block.parts}
    x = inputs(100, block.width, 1)
    yes, no = torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    size = torch.full((100,), 2.0)
    size[0] = 500.0
    young, held = no.clone(), torch.arange(100) >= 90
    young[1] = True
    arrival = Arrival(x, yes, x.clone(), size, held, young)
    station = Station(block, modules, (arrival,), ())
    with torch.no_grad():
        original = block.weights(modules)
        objective = Objective(original, Target.of(station), torch.tensor(2.0), torch.tensor(1.0), 100.0, 1000.0, False)
        none = Affine(torch.zeros(0, block.width), torch.zeros(0))
        (batch,) = _batches(station, objective.batch, none, torch.zeros(0, block.out))
    assert batch.fitted.tolist() == list(range(1, 90))
    assert batch.held.tolist() == list(range(90, 100))
    assert batch.root[1] > 2 * batch.root[2]


def test_units_that_point_at_sinks_stay_as_they_are():
    """And what they write elsewhere is taken off by the others."""
    generator = torch.Generator().manual_seed(4)

    def drawn(count):
        return torch.randn(1, count, dtype=torch.float64, generator=generator)

    poly = fitted(2, 0)[0].polynomial
    units = UnitPolynomials(poly.a, poly.b, torch.ones(len(poly.a)), 1.0)
    pointing = Affine(drawn(poly.width) * 0.02, torch.zeros(1, dtype=torch.float64))
    hidden = HiddenPolynomial(poly.gate, poly.up, units).with_sink_units(pointing)
    sink = 30 * drawn(poly.out)
    readout = torch.cat([poly.down.weight.T, sink, poly.down.bias[None]])
    station = station_of()
    with torch.no_grad():
        original = station.block.weights(station.modules)
        objective = Objective(original, Target.of(station), torch.tensor(6.0), torch.tensor(1.0), 1e6, 50.0, False)
        found = reconstructed(hidden, readout, station, objective.batch, 1, 4)
    assert found is not None
    assert torch.equal(found.hidden.gate.weight[-1:], pointing.weight.float())
    assert torch.equal(found.readout[-2:-1], sink)
    x = inputs(2000, poly.width, 8)
    with torch.no_grad():
        whole = [(h.to(torch.float64)(x.double()) @ r).float() for h, r in ((hidden, readout), found)]
        errors = [float((value - original(x)).norm()) for value in whole]
    assert errors[1] < 0.7 * errors[0]


def test_it_needs_a_readout_that_is_solved_again():
    with pytest.raises(RecipeError, match="epochs needs readout: refit"):
        surgery.convert(tiny.make("llama"), text=IDS, epochs=2, readout="keep")
    for settings, epochs in (
        ({}, 6),
        ({"degree": 3}, 0),
        ({"degree": 3, "epochs": 2}, 2),
        ({"readout": "keep"}, 0),
        ({"degree": 1}, 0),
        ({"epochs": 3}, 3),
    ):
        assert Recipe(**settings).resolved()["epochs"] == epochs
