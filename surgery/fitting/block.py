"""Calibrate and solve one block: arrivals at its entrance in, its polynomial out.

Two passes over the block's inputs. The first, over a sample of them, gives the moments of the hidden units, their
polynomials and the sinks. The second, over all, gives the normal equations of the readout. Both are float64 sums. All
maps may descend together (:mod:`surgery.fitting.reconstruction`) from a readout solved on some of the inputs; then it
is solved once more, on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from surgery.blocks.block import Block
from surgery.blocks.weights import BlockWeights
from surgery.calibration.arrivals import Station
from surgery.closed_form import sinks
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine, guarded
from surgery.closed_form.least_squares import solve_units
from surgery.closed_form.moments import (
    GaussianMixture,
    InputMoments,
    Preactivations,
    UnitMoments,
    at_least_float32,
    from_data,
    from_gaussian,
)
from surgery.fitting.features import HiddenPolynomial, RoundedHidden
from surgery.fitting.objective import Aim, Objective, mistaken
from surgery.fitting.readout import Readout, kept_readout, refit
from surgery.fitting.reconstruction import reconstructed
from surgery.fitting.sample import CHUNK, Sample, some_of, take_sample
from surgery.fitting.target import Target
from surgery.runtime import processes
from surgery.runtime.precision import chosen_dtype

UNIT_TOKENS, FAR_UNIT_TOKENS = 8192, 32768  # at degrees up to 2, and above
BEGINNING = 8  # tokens a feature, of the solution that descent begins from


@dataclass(frozen=True)
class FitSettings:
    """What one block's fit depends on; see :class:`surgery.conversion.recipe.Recipe` for the meaning of each."""

    degree: int
    assume: str = "data"
    refit: bool = True
    tail_weight: float = 0.0
    tail_width: float = 3.0
    guard: bool = False
    units: float = 1.0
    epochs: int = 0
    sink_limit: float = sinks.MASSIVE
    matmul: str = "float32"

    @property
    def unit_tokens(self) -> int:
        """How many tokens units are solved on. High powers hang on the few that are far from the mean."""
        return UNIT_TOKENS if self.degree <= 2 else FAR_UNIT_TOKENS


MEASURES = (
    *("r2_fit", "r2_held", "r2_units_median", "ridge", "condition", "sink_tokens", "sink_units", "sink_mistaken"),
    *("sink_error", "quadrature_error", "tokens"),
)
"""What the report says of a block, by the names of :class:`FittedBlock`'s fields."""


@dataclass(frozen=True)
class FittedBlock:
    """A block's polynomial and how good it is.

    Attributes:
        polynomial: what takes its place; sink units are its last.
        r2_fit, r2_held: share of the block's own output variance (on the twin's stream, without sinks) explained on
            tokens used and not used for fitting.
        r2_units_median: over units of the share explained by the unit's own polynomial.
        ridge: chosen λ; None where the readout was kept.
        condition: largest condition number met.
        sink_tokens, sink_error: how many tokens of the sample were sinks, and the median error there relative to the
            residual stream after the block.
        sink_units: how many units point at sinks.
        sink_mistaken: ordinary tokens of the sample that these units take for sinks; left out of the fit and of R².
        quadrature_error: relative, 0 for data.
        tokens: used for fitting, held out included.
        outputs, written: what the twin's and the original's block write to each batch, where computed on the way.
    """

    block: Block
    polynomial: BlockPolynomial
    r2_fit: float
    r2_held: float
    r2_units_median: float
    ridge: float | None
    condition: float
    sink_tokens: int
    sink_error: float
    sink_units: int
    sink_mistaken: int
    quadrature_error: float
    tokens: int
    outputs: tuple[Tensor, ...] = ()
    written: tuple[Tensor, ...] = ()

    @property
    def polynomials(self) -> tuple[BlockPolynomial]:
        return (self.polynomial,)

    def row(self, seconds: float = 0.0) -> dict[str, Any]:
        """Its line in the report."""
        block, degree = self.block, self.polynomial.degree
        about = {"path": block.path, "kind": block.kind, "activation": block.activation, "degree": degree}
        return {**about, **{name: getattr(self, name) for name in MEASURES}, "seconds": round(seconds, 3)}


def fit_block(
    station: Station,
    settings: FitSettings,
    given: GaussianMixture | None = None,
    cache_bytes: int = 0,
    original: BlockWeights | None = None,
    corrections: Sequence[Tensor] = (),
) -> FittedBlock:
    """The least-squares optimal polynomial of one block.

    Args:
        station: all passes waiting at the block; with the original stream where errors are to be made up for.
        given: distribution of the block's input for `assume="gaussian"`; measured where None.
        cache_bytes: memory that may be spent to keep hidden vectors, so that `outputs` come back.
        original: the block's weights, where they are not in modules of its own.
        corrections: what the block should write beyond its own output, by batch, (tokens, out) each.
    Raises:
        CalibrationError: too few tokens for the unknowns, or values that are not finite.
    """
    block = station.block
    original = replace(original or block.weights(station.modules), matmul=settings.matmul)
    target = Target.of(station, corrections)
    sample = take_sample(target, original, settings.degree, settings.unit_tokens, settings.sink_limit)
    inputs = InputMoments.of(sample.x[~sample.massive])
    at = Preactivations.of(inputs, original.gate, original.up)
    moments = _moments(original, at, sample, settings, given)
    units = solve_units(moments)
    if settings.guard and settings.degree == 2 and units.b is not None:
        units = guarded(moments, units)
    writer = settings.degree > 1 and sinks.written(sample.size[sample.sink], sample.reaching[sample.sink])
    pointing = sinks.directions(inputs, sample.x[sample.sink if writer else []])
    extra = len(pointing.bias)

    def closed_form() -> HiddenPolynomial:
        """Made anew where it is used: in float64 it would lie beside the normal equations."""
        return HiddenPolynomial.of(original, at, units).with_sink_units(pointing)

    if settings.refit:
        objective = Objective.of(original, target, sample, writer=extra > 0)
        hidden, readout = _solved(closed_form, objective, extra, settings, cache_bytes, inputs.mean)
    else:
        hidden = closed_form()
        features = hidden.to(sample.x.dtype)(sample.x[sample.sink])
        readout = kept_readout(hidden.prior_readout(original.down), features, sample.aim, extra)
    twin = hidden.to(sample.x.dtype)
    predicted = _predicted(readout, twin, sample)
    ordinary = sample.ordinary & ~mistaken(pointing.to(sample.x.dtype)(sample.x).square())
    solution = readout.choice.weight
    return FittedBlock(
        block=block,
        polynomial=hidden.with_readout(Affine(solution[:-1].T.contiguous(), solution[-1])),
        r2_fit=_r2(predicted, sample.output, ordinary & ~sample.held),
        r2_held=_r2(predicted, sample.output, ordinary & sample.held),
        r2_units_median=float(hidden.units.r2.median()),
        ridge=readout.choice.ridge,
        condition=max(hidden.units.condition, readout.choice.condition),
        sink_tokens=int(sample.sink.sum()),
        sink_error=_sink_error(target, sample, predicted, writer),
        sink_units=extra,
        sink_mistaken=int((sample.ordinary & ~ordinary).sum()),
        quadrature_error=hidden.units.error,
        tokens=int(processes.sum_number(sum(int(arrival.keep.sum()) for arrival in station.twin))),
        outputs=readout.outputs,
        written=readout.written,
    )


def _predicted(readout: Readout, twin: HiddenPolynomial, sample: Sample) -> Tensor:
    """What the polynomial writes at the sample's rows, (tokens, out)."""
    if readout.outputs:
        own = [part[rows] for part, rows in zip(readout.outputs, sample.rows, strict=True)]
        return processes.together(torch.cat(own))
    solution = readout.choice.weight.to(sample.x)
    return processes.together(torch.cat([twin(part) @ solution for part in processes.own_rows(sample.x).split(CHUNK)]))


def _solved(
    closed_form: Callable[[], HiddenPolynomial],
    objective: Objective,
    sink_units: int,
    settings: FitSettings,
    cache_bytes: int,
    centre: Tensor,
) -> tuple[HiddenPolynomial, Readout]:
    """The units and the readout re-solved on them; with epochs, both fitted on from there and the readout once more."""
    original, dtype = objective.original, objective.target.station.twin[0].x.dtype
    units = len(original.gate[0])
    wanted = max(1, round(settings.units * units)) if settings.degree > 1 else None
    station, counts = objective.target.station, objective.target.counts

    def solved(on: Station, aim_of: Callable[[int], Aim], memory: int) -> tuple[HiddenPolynomial, Readout]:
        hidden = closed_form()
        prior, twin = hidden.prior_readout(original.down), _multiplied(hidden.to(dtype), centre, sink_units, settings)
        readout = refit(on, aim_of, twin, prior, sink_units, counts, memory, wanted)
        del prior, hidden, twin
        return closed_form() if readout.kept is None else closed_form().keep_units(readout.kept[:-1]), readout

    epochs = settings.epochs if settings.degree > 1 else 0
    if not epochs:
        return solved(station, objective.batch, cache_bytes)
    aims = [objective.batch(number) for number in range(len(station.twin))]
    some = _beginning(station, aims, units) if wanted == units else None
    hidden, begun = solved(station, aims.__getitem__, 0) if some is None else solved(*some, 0)
    all_seen = some is None
    del some
    weight = begun.choice.weight
    better = reconstructed(hidden, weight, station, aims.__getitem__, sink_units, epochs, settings.matmul)
    if better is None:
        return (hidden, begun) if all_seen else solved(station, aims.__getitem__, 0)
    del hidden, begun, weight
    readout = refit(station, aims.__getitem__, better.hidden.to(dtype), better.readout, sink_units, counts, cache_bytes)
    return better.hidden.to(torch.float64), readout


def _multiplied(
    hidden: HiddenPolynomial, centre: Tensor, sink_units: int, settings: FitSettings
) -> HiddenPolynomial | RoundedHidden:
    """The hidden vectors that a readout is solved on, as `matmul` says."""
    weight = hidden.gate.weight
    rounded = chosen_dtype(settings.matmul, weight.device) == "bfloat16" and weight.dtype == torch.float32
    return RoundedHidden.of(hidden, centre, sink_units) if rounded and hidden.units.degree > 1 else hidden


def beginning_share(tokens: float, units: int) -> float:
    """Of the tokens, how many the solution is made of that descent begins from."""
    return min(1.0, BEGINNING * units / max(1.0, tokens))


def _beginning(station: Station, aims: Sequence[Aim], units: int) -> tuple[Station, Callable[[int], Aim]] | None:
    """By batch that share of the ordinary tokens, all that is held out, and all sinks, which weigh as much less; None
    where that is all there is."""
    kept = processes.sum_number(sum(int(arrival.keep.sum()) for arrival in station.twin))
    share = beginning_share(kept, units)
    if share == 1:
        return None
    rows = []
    for number, (arrival, aim) in enumerate(zip(station.twin, aims, strict=True), station.number):
        ordinary = (arrival.keep & ~arrival.held & ~aim.sink).nonzero()[:, 0]
        taken = arrival.held | aim.sink
        taken[ordinary[some_of(len(ordinary), share, number).to(ordinary.device)]] = True
        rows.append(taken.nonzero()[:, 0])  # those that are held out stay last

    def aim_of(number: int) -> Aim:
        aim = aims[number].at(rows[number])
        return aim._replace(weight=torch.where(aim.sink, share * aim.weight, aim.weight))

    twin = tuple(arrival.at(some) for arrival, some in zip(station.twin, rows, strict=True))
    return replace(station, twin=twin, original=()), aim_of


def _moments(
    original: BlockWeights, at: Preactivations, sample: Sample, settings: FitSettings, given: GaussianMixture | None
) -> UnitMoments:
    degree = settings.degree

    def gaussian(moments: InputMoments, weight: float) -> UnitMoments:
        return from_gaussian(
            original.activation, at, Preactivations.of(moments, original.gate, original.up), degree, weight
        )

    if given is not None:
        parts = [
            gaussian(InputMoments.gaussian(mean.to(sample.x.device), covariance.to(sample.x.device)), float(weight))
            for weight, mean, covariance in zip(given.weights, given.means, given.covariances, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    if settings.assume == "gaussian":
        return from_gaussian(original.activation, at, at, degree)
    rows = ~sample.massive  # sinks on their way to become massive are ordinary points for most units
    counted = sample.x[rows]
    shared = len(counted) >= processes.count()  # else somebody would have none
    mine = processes.own_rows(counted) if shared else counted
    sums = (from_data(original.activation, at, *original.preactivations(part), degree) for part in mine.split(CHUNK))
    measured = reduce(add, sums)
    if shared:
        measured = _over_processes(measured)
    if settings.tail_weight == 0:
        return measured
    spread = at.widened(settings.tail_width)
    return measured + from_gaussian(original.activation, at, spread, degree, measured.weight * settings.tail_weight)


def _over_processes(own: UnitMoments) -> UnitMoments:
    """The sums of all processes."""
    for part in (own.u, own.t, own.tt, own.vu, own.vvu, own.tvu):
        if part is not None:
            processes.total(part)
    return replace(own, weight=processes.sum_number(own.weight))


def _r2(predicted: Tensor, truth: Tensor, rows: Tensor) -> float:
    p, t = at_least_float32(predicted[rows]), at_least_float32(truth[rows])
    left, all_of_it = ((part.square().sum(dtype=torch.float64)) for part in (p - t, t - t.mean(0)))
    return float(1 - left / all_of_it.clamp_min(1e-300))


def _sink_error(target: Target, sample: Sample, predicted: Tensor, writer: bool) -> float:
    if not len(sample.aim):
        return 0.0
    truth = target.joining((sample.aim if writer else sample.output[sample.sink]).double())
    after = truth.norm(dim=-1) + sample.size[sample.sink].double()
    return float(((target.joining(predicted[sample.sink].double()) - truth).norm(dim=-1) / after).median())
