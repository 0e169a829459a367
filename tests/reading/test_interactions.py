"""The quadratic form between features: against the dense expansion, planted pairs found, and nothing found in noise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine
from surgery.reading import interactions
from surgery.reading.activations import Activations
from surgery.reading.interactions import Agreement, FeatureForm, curve, strongest, written
from tests.closed_form.support import OUT, WIDTH, random_block
from tests.reading.dictionaries import draw, orthogonal


def sparse(tokens, n, seed=0, share=0.4):
    """Activations of which a share is other than 0."""
    kept = torch.rand(tokens, n, generator=torch.Generator().manual_seed(seed)) < share
    return draw(tokens, n, seed=seed).abs() * kept


def ranked(form, a, count=interactions.KEPT, by="text"):
    """The terms of dense activations, ranked on all tokens."""
    return strongest(form, Activations.of([a]), torch.ones(len(a), dtype=torch.bool), count, by)


def values_of(form, terms, a):
    return torch.cat(list(written(form, terms, Activations.of([a]))), -1)


def case(gated, seed, n=11, tokens=30):
    block = random_block(2, gated, seed)
    directions, point, w = (
        draw(*shape, seed=seed + place).double() for place, shape in enumerate(((n, WIDTH), (WIDTH,), (OUT,)), 5)
    )
    return block, FeatureForm.of(block.expand(point), w, directions), sparse(tokens, n, seed), directions, point, w


@given(gated=st.booleans(), seed=st.integers(0, 99), by=st.sampled_from(["text", "weights"]))
def test_all_terms_together_are_the_block(gated, seed, by):
    block, form, a, directions, point, w = case(gated, seed)
    terms = ranked(form, a, by=by)
    total = form.constant + values_of(form, terms, a).sum(-1)
    wanted = block(a.double() @ directions + point) @ w
    torch.testing.assert_close(total, wanted, rtol=1e-9, atol=1e-8)
    assert terms.share.sum() == pytest.approx(1)


@given(gated=st.booleans(), seed=st.integers(0, 99))
def test_terms_are_those_of_the_dense_form(gated, seed):
    block, form, a, directions, point, w = case(gated, seed)
    dense = directions @ block.expand(point).quadratic(w).dense() @ directions.T
    terms = ranked(form, a)
    alone = terms.first == terms.second
    torch.testing.assert_close(terms.weight, dense[terms.first, terms.second] * (2 - alone.double()))
    values = values_of(form, terms, a)
    torch.testing.assert_close(terms.strength.abs(), values.std(0, correction=0), rtol=1e-4, atol=1e-6)
    assert (terms.strength.abs().diff() <= 1e-9).all()
    pairs = {frozenset((int(i), int(j))) for i, j in zip(terms.first, terms.second, strict=True)}
    assert len(pairs) == len(terms.first), "each term once"


def test_rows_at_a_time_change_nothing(monkeypatch):
    _, form, a, *_ = case(True, 3)
    whole = {by: ranked(form, a, 20, by) for by in ("text", "weights")}
    monkeypatch.setattr(interactions, "ROWS", 2)
    monkeypatch.setattr(interactions, "DENSE_LIMIT", 0)
    monkeypatch.setattr(interactions, "TOGETHER", 3)
    _, wide, *_ = case(True, 3)
    for by, terms in whole.items():
        again = ranked(wide, a, 20, by)
        torch.testing.assert_close(again.strength, terms.strength)
        assert again.first.tolist() == terms.first.tolist() and again.second.tolist() == terms.second.tolist()
        assert again.total == pytest.approx(terms.total)


PLANTED = {(1, 4): 2.0, (0, 7): -1.5, (3, 3): 1.0}


def planted(n=WIDTH + 2):
    """A bilinear block whose output 0 is Σ c_ij (d_i·x)(d_j·x) over a few pairs of orthogonal directions."""
    d = orthogonal(n)
    pairs = list(PLANTED)
    gate, up = (Affine(d[[pair[end] for pair in pairs]], torch.zeros(len(pairs)).double()) for end in (0, 1))
    weight = torch.zeros(OUT, len(pairs)).double()
    weight[0] = torch.tensor(list(PLANTED.values()))
    b = torch.tensor([0.0, 1.0]).double().expand(len(pairs), 2)
    block = BlockPolynomial(gate, up, torch.zeros(len(pairs), 3).double(), b, Affine(weight, torch.zeros(OUT).double()))
    return block, d


@pytest.mark.parametrize("by", ["text", "weights"])
def test_planted_interactions_are_found_and_nothing_else(by):
    block, d = planted()
    w = torch.eye(OUT)[0].double()
    form = FeatureForm.of(block.expand(torch.zeros(len(d)).double()), w, d)
    a = sparse(400, len(d), 1)
    terms = ranked(form, a, by=by)
    found = {tuple(sorted((int(i), int(j)))) for i, j in zip(terms.first[:3], terms.second[:3], strict=True)}
    assert found == set(PLANTED)
    assert terms.share[:3].sum() > 1 - 1e-6  # strengths are float32
    for i, j, weight in zip(terms.first[:3], terms.second[:3], terms.weight[:3], strict=True):
        assert float(weight) == pytest.approx(PLANTED[tuple(sorted((int(i), int(j))))])
    other = FeatureForm.of(block.expand(torch.zeros(len(d)).double()), w, draw(60, len(d)).double())
    random = ranked(other, sparse(400, 60), by=by)
    assert random.share[:3].sum() < 0.1, "a random dictionary: nothing stands out"


def test_features_that_never_fire_are_left_out():
    _, form, a, *_ = case(True, 1)
    a[:, 2] = 0
    terms = ranked(form, a)
    assert 2 not in terms.first and 2 not in terms.second
    silent = ranked(form, torch.zeros_like(a))
    assert len(silent.first) == 0 and silent.total == 0


def test_the_curve_rises_to_all_there_is():
    block, form, a, directions, point, w = case(True, 2)
    fitted = torch.arange(len(a)) < 20
    terms = strongest(form, Activations.of([a]), fitted, by="weights")
    found = curve(
        form, terms, Activations.of([a[:7], a[7:]]), block(a.double() @ directions + point) @ w, fitted, ~fitted
    )
    assert [number for number, _ in found] == [1, 2, 5, 10, 20, 50, len(terms.first)]
    assert found[-1][1].r2 == pytest.approx(1) and found[-1][1].correlation == pytest.approx(1)
    assert found[0][1].r2 < found[3][1].r2 < 1


def test_agreement_is_r2_and_correlation():
    value, guess = draw(50).double(), draw(50, seed=1).double()
    found = Agreement.of(value, guess)
    assert found.correlation == pytest.approx(float(torch.corrcoef(torch.stack((value, guess)))[0, 1]))
    assert found.r2 == pytest.approx(1 - float((value - guess).square().sum() / (value - value.mean()).square().sum()))
    assert Agreement.of(value, torch.ones(50)).correlation == 0


@given(seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.1, 1.0]))
def test_activations_are_the_dense_matrix(seed, share):
    dense, mask = sparse(12, 7, seed, share) - 2 * sparse(12, 7, seed + 1, share), torch.arange(12) % 3 > 0
    held = Activations.of(dense.split(5))
    assert held.tokens == 12 and held.size == 7
    torch.testing.assert_close(held.columns(torch.arange(7)), dense)
    torch.testing.assert_close(held.column(3), dense[:, 3].double())
    masked = dense * mask[:, None]
    torch.testing.assert_close(held.on(mask).columns(torch.tensor([6, 0, 6])), masked[:, [6, 0, 6]])
    assert held.on(mask).counts().tolist() == (masked != 0).sum(0).tolist()
    factors = draw(12, seed=seed)
    torch.testing.assert_close(held.scaled(factors).columns(torch.arange(7)), dense * factors[:, None])
    counts = (dense != 0).sum(0).clamp_min(1)
    torch.testing.assert_close(held.usual(), (dense.square().sum(0) / counts).sqrt())
    directions = draw(7, 4, seed=seed).double()
    torch.testing.assert_close(held.times(directions), dense.double() @ directions)
