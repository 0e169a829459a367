"""Calibrate and solve one block: arrivals at its entrance in, its polynomial out.

Two passes over the block's inputs. The first, over a sample of them, gives the moments of the hidden units, their
polynomials and the sinks. The second, over all, gives the normal equations of the readout. Both are float64 sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.blocks.block import Block
from surgery.blocks.weights import BlockWeights
from surgery.calibration.arrivals import Arrival, Station
from surgery.closed_form import sinks
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine, guarded
from surgery.closed_form.least_squares import UnitPolynomials, solve_units
from surgery.closed_form.moments import (
    GaussianMixture,
    InputMoments,
    Preactivations,
    UnitMoments,
    from_data,
    from_gaussian,
)
from surgery.errors import CalibrationError
from surgery.fitting.features import HiddenPolynomial
from surgery.fitting.readout import CHUNK, RefittedReadout, behind, fill_sink_columns, mistaken, refit
from surgery.runtime import processes

TOKENS_PER_UNKNOWN = 20


@dataclass(frozen=True)
class FitSettings:
    """What one block's fit depends on; see :class:`surgery.conversion.recipe.Recipe` for the meaning of each."""

    degree: int
    assume: str = "data"
    refit: bool = True
    unit_tokens: int = 8192
    tail_weight: float = 0.0
    tail_width: float = 3.0
    guard: bool = False
    units: float = 1.0


@dataclass(frozen=True)
class FittedBlock:
    """A block's polynomial and how good it is.

    Attributes:
        polynomial: what takes its place; sink units are its last.
        r2_fit, r2_held: share of the block's own output variance (on the twin's stream, sinks aside) explained on
            tokens used and not used for fitting.
        r2_units: median over units of the share explained by the unit's own polynomial.
        ridge: chosen λ; None where the readout was kept.
        condition: largest condition number met.
        sink_tokens, sink_error: how many tokens of the sample were sinks, and the median error there relative to the
            residual stream after the block.
        sink_units: how many units point at sinks.
        mistaken: ordinary tokens of the sample that these units take for sinks; left out of the fit and of R².
        quadrature_error: relative, 0 for data.
        tokens: used for fitting, held out included.
        outputs, written: what the twin's and the original's block write to each batch, where computed on the way.
    """

    block: Block
    polynomial: BlockPolynomial
    r2_fit: float
    r2_held: float
    r2_units: float
    ridge: float | None
    condition: float
    sink_tokens: int
    sink_error: float
    sink_units: int
    mistaken: int
    quadrature_error: float
    tokens: int
    outputs: tuple[Tensor, ...] = ()
    written: tuple[Tensor, ...] = ()

    @property
    def polynomials(self) -> tuple[BlockPolynomial]:
        return (self.polynomial,)

    def row(self, seconds: float = 0.0) -> dict[str, Any]:
        """Its line in the report."""
        return {
            "path": self.block.path,
            "kind": self.block.kind,
            "activation": self.block.activation,
            "degree": self.polynomial.degree,
            "r2_fit": self.r2_fit,
            "r2_held": self.r2_held,
            "r2_units_median": self.r2_units,
            "ridge": self.ridge,
            "condition": self.condition,
            "sink_tokens": self.sink_tokens,
            "sink_units": self.sink_units,
            "sink_mistaken": self.mistaken,
            "sink_error": self.sink_error,
            "quadrature_error": self.quadrature_error,
            "tokens": self.tokens,
            "seconds": round(seconds, 3),
        }


@dataclass(frozen=True)
class _Sample:
    """What the first pass looks at: `rows` of each batch."""

    rows: tuple[Tensor, ...]
    x: Tensor
    y: Tensor
    z: Tensor | None
    output: Tensor
    size: Tensor
    ordinary: Tensor
    sink: Tensor
    held: Tensor
    massive: Tensor
    limit: float
    aim: Tensor  # what the block should write at the sinks


def fit_block(
    station: Station,
    settings: FitSettings,
    given: GaussianMixture | None = None,
    cache_bytes: int = 0,
    original: BlockWeights | None = None,
) -> FittedBlock:
    """The least-squares optimal polynomial of one block.

    Args:
        station: all passes waiting at the block; with the original stream where errors are to be made up for.
        given: distribution of the block's input for `assume="gaussian"`; measured where None.
        cache_bytes: memory that may be spent to keep hidden vectors, so that `outputs` come back.
        original: the block's weights, where they are not in modules of its own.
    Raises:
        CalibrationError: too few tokens for the unknowns, or values that are not finite.
    """
    block = station.block
    original = original or block.weights(station.modules)
    sample = _take_sample(station, original, settings)
    inputs = InputMoments.of(sample.x[~sample.massive])
    at = Preactivations.of(inputs, original.gate, original.up)
    moments = _moments(original, at, sample, settings, given)
    units = solve_units(moments)
    if settings.guard and settings.degree == 2 and units.b is not None:
        units = guarded(moments, units)
    writer = settings.degree > 1 and sinks.written(sample.size[sample.sink], sample.output[sample.sink])
    pointing = sinks.directions(inputs, sample.x[sample.sink if writer else []])
    prior, twin = _features(original, at, units, pointing, sample.x.dtype)
    extra = len(pointing.bias)
    result: RefittedReadout | None = None
    if settings.refit:
        sink_boost = float(sample.ordinary.sum()) / max(1, int(sample.sink.sum()))
        result = refit(
            station, original, twin, prior,
            sink_limit=sample.limit, sink_boost=sink_boost, sink_units=extra, cache_bytes=cache_bytes,
            units=max(1, round(settings.units * block.hidden)) if settings.degree > 1 else None,
        )  # fmt: skip
        solution = result.choice.weight
    else:
        solution = fill_sink_columns(prior, twin(sample.x[sample.sink]), sample.aim, extra)
    del prior
    hidden = HiddenPolynomial.of(original, at, units).with_sink_units(pointing)
    if result and result.kept is not None:
        hidden = hidden.keep_units(result.kept[:-1])
        twin = hidden.to(sample.x.dtype)
    readout = Affine(solution[:-1].T.contiguous(), solution[-1])
    if result and result.outputs:
        predicted = torch.cat([part[rows] for part, rows in zip(result.outputs, sample.rows, strict=True)])
        predicted = processes.together(predicted)
    else:
        predicted = torch.cat([twin(part) @ solution.to(part) for part in sample.x.split(CHUNK)])
    ordinary = sample.ordinary & ~mistaken(pointing.to(sample.x.dtype)(sample.x).square())
    return FittedBlock(
        block=block,
        polynomial=hidden.with_readout(readout),
        r2_fit=_r2(predicted, sample.output, ordinary & ~sample.held),
        r2_held=_r2(predicted, sample.output, ordinary & sample.held),
        r2_units=float(hidden.units.r2.median()),
        ridge=result.choice.ridge if result else None,
        condition=max(hidden.units.condition, result.choice.condition if result else 0.0),
        sink_tokens=int(sample.sink.sum()),
        sink_error=_sink_error(sample, predicted, writer),
        sink_units=extra,
        mistaken=int((sample.ordinary & ~ordinary).sum()),
        quadrature_error=hidden.units.error,
        tokens=int(processes.sum_number(sum(int(arrival.keep.sum()) for arrival in station.twin))),
        outputs=result.outputs if result else (),
        written=result.written if result else (),
    )


def _features(
    original: BlockWeights, at: Preactivations, units: UnitPolynomials, pointing: Affine, dtype: torch.dtype
) -> tuple[Tensor, HiddenPolynomial]:
    """The readout that the ridge pulls towards, and the hidden vector it is on. The first maps in float64 are let go
    of: they would lie beside the normal equations."""
    hidden = HiddenPolynomial.of(original, at, units).with_sink_units(pointing)
    return hidden.prior_readout(original.down), hidden.to(dtype)


def _take_sample(station: Station, original: BlockWeights, settings: FitSettings) -> _Sample:
    """Tokens drawn from all batches alike, enough for the units (always several per input dimension)."""
    rows = _drawn(station, max(settings.unit_tokens, 4 * station.block.width))

    def gathered(name: str, arrivals: tuple[Arrival, ...] = station.twin) -> Tensor:
        return processes.together(
            torch.cat([getattr(arrival, name)[at] for arrival, at in zip(arrivals, rows, strict=True)])
        )

    x, size, held = gathered("x"), gathered("size"), gathered("held")
    unknowns = 2 * settings.degree + 1
    if len(x) < TOKENS_PER_UNKNOWN * unknowns:
        raise CalibrationError(
            f"{len(x)} tokens are too few for the {unknowns} coefficients of a unit",
            where=station.block.path,
            cause=f"at least {TOKENS_PER_UNKNOWN} tokens per coefficient are needed",
            fix="give more calibration text or tokens, or a lower degree",
        )
    y, z = original.preactivations(x)
    output = nn.functional.linear(original.hidden(y, z), *original.down)
    if not bool(torch.isfinite(output).all()):
        raise CalibrationError("the block's output holds NaN or infinite values", where=station.block.path)
    norm = output.float().norm(dim=-1)
    total = (size.square() + norm.square()).sqrt()
    limit = sinks.threshold(total)
    truly = gathered("size", station.original or station.twin)
    sink = ((truly.square() + norm.square()).sqrt() > limit) | gathered("known_sink")
    aim = output[sink]
    if station.original and station.block.additive:
        own = [len(at) for at in rows]
        before = sum(processes.gather(sum(own))[: processes.rank()])
        parts = sink[before : before + sum(own)].split(own)
        triples = zip(
            station.twin, station.original, (at[part] for at, part in zip(rows, parts, strict=True)), strict=True
        )
        aim = processes.together(
            torch.cat([original(other.x[at]) + behind(twin, other, at) for twin, other, at in triples])
        )
    return _Sample(rows, x, y, z, output, size, ~sink, sink, held, total > limit, limit, aim)


def _drawn(station: Station, wanted: int) -> tuple[Tensor, ...]:
    """Row numbers, ascending, of about `wanted` real tokens: the same share of every batch, the same in every run."""
    real = [arrival.keep.nonzero()[:, 0] for arrival in station.twin]
    share = min(1.0, wanted / max(1, processes.sum_number(sum(len(rows) for rows in real))))
    drawn = []
    for number, rows in enumerate(real, start=station.number):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))
        drawn.append(rows[order[: math.ceil(share * len(rows))].sort().values.to(rows.device)])
    return tuple(drawn)


def _moments(
    original: BlockWeights, at: Preactivations, sample: _Sample, settings: FitSettings, given: GaussianMixture | None
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
    measured = from_data(original.activation, at, sample.y[rows], None if sample.z is None else sample.z[rows], degree)
    if settings.tail_weight == 0:
        return measured
    wide = settings.tail_width**2
    spread = Preactivations(
        at.y_mean, at.y_std * settings.tail_width, at.z_mean,
        None if at.z_std is None else at.z_std * settings.tail_width,
        None if at.covariance is None else at.covariance * wide,
    )  # fmt: skip
    return measured + from_gaussian(original.activation, at, spread, degree, measured.weight * settings.tail_weight)


def _r2(predicted: Tensor, truth: Tensor, rows: Tensor) -> float:
    p, t = predicted[rows].double(), truth[rows].double()
    return float(1 - (p - t).square().sum() / (t - t.mean(0)).square().sum().clamp_min(1e-300))


def _sink_error(sample: _Sample, predicted: Tensor, writer: bool) -> float:
    if not len(sample.aim):
        return 0.0
    truth = (sample.aim if writer else sample.output[sample.sink]).double()
    after = truth.norm(dim=-1) + sample.size[sample.sink].double()
    return float(((predicted[sample.sink].double() - truth).norm(dim=-1) / after).median())
