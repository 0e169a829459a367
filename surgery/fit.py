"""Calibrate and solve one block: arrivals at its entrance in, its polynomial out.

Two passes over the block's inputs. The first, over a sample of them, gives the moments of the hidden units, their
polynomials and the sinks. The second, over all, gives the normal equations of the readout. Both are float64 sums.
"""

from __future__ import annotations


from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery import sinks
from surgery.activations import Activation
from surgery.blocks import Block, activation_of, weight_and_bias
from surgery.errors import CalibrationError
from surgery.lstsq import Readout, RidgeSums, UnitPolynomials, ridge_path, solve_units
from surgery.moments import InputMoments, Preactivations, UnitMoments, from_data, from_gaussian
from surgery.polynomial import Affine, guarded, standardised
from surgery.stream import Arrival, Station

CHUNK = 1024  # tokens whose hidden vectors are held at once
HELD_OUT_EVERY = 8  # one sequence in eight chooses the ridge
TOKENS_PER_UNKNOWN = 20


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian, or a mixture of them, for a block's input: weights (k,), means (k, d), covariances (k, d, d)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor


@dataclass(frozen=True)
class FitSettings:
    """What one block's fit depends on; see :class:`surgery.recipe.Recipe` for the meaning of each."""

    degree: int
    assume: str = "data"
    refit: bool = True
    unit_tokens: int = 16384
    tail_weight: float = 0.0
    tail_width: float = 3.0
    guard: bool = False


@dataclass(frozen=True)
class Original:
    """The block's weights, whatever modules hold them."""

    activation: Activation
    gate: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None] | None
    down: tuple[Tensor, Tensor | None]

    @staticmethod
    def of(block: Block, modules: Mapping[str, Any]) -> Original:
        first = [weight_and_bias(modules[path]) for path in block.first]
        if block.kind == "fused":
            weight, bias = first[0]
            halves = weight.chunk(2, dim=0)
            biases = (None, None) if bias is None else bias.chunk(2, dim=0)
            first = [(halves[0], biases[0]), (halves[1], biases[1])]
        up = first[1] if len(first) == 2 else None
        down = weight_and_bias(modules[block.last])
        for weight, bias in (*first, down):
            if not bool(torch.isfinite(weight).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
                raise CalibrationError("the weights hold NaN or infinite values", where=block.path)
        return Original(activation_of(modules[block.activation_path], block), first[0], up, down)

    def preactivations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = nn.functional.linear(x, *self.gate)
        return y, None if self.up is None else nn.functional.linear(x, *self.up)

    def hidden(self, y: Tensor, z: Tensor | None) -> Tensor:
        value = self.activation.function(y)
        return value if z is None else value * z

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.hidden(*self.preactivations(x)), *self.down)


@dataclass(frozen=True)
class FittedBlock:
    """A block's polynomial and how good it is.

    Attributes:
        gate, up: affine maps to the standardised u and v, sink units last; up is None in a plain block.
        units: polynomials, sink units included; None for degree 1, where `readout` reads the input itself.
        readout: the last affine map.
        r2_fit, r2_held: share of the block's own output variance (on the twin's stream, sinks aside) explained on
            tokens used and not used for fitting.
        r2_units: median over units of the share explained by the unit's own polynomial.
        ridge: chosen λ; None where the readout was kept.
        condition: largest condition number met.
        sink_tokens, sink_error: how many tokens were sinks in the sample, and the relative error of the output there.
        quadrature_error: relative, 0 for data.
        tokens: used for fitting, held out included.
    """

    block: Block
    degree: int
    gate: Affine | None
    up: Affine | None
    units: UnitPolynomials | None
    readout: Affine
    r2_fit: float
    r2_held: float
    r2_units: float
    ridge: float | None
    condition: float
    sink_tokens: int
    sink_error: float
    quadrature_error: float
    tokens: int
    outputs: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class _Sample:
    """Rows the first pass looks at."""

    x: Tensor
    y: Tensor
    z: Tensor | None
    output: Tensor
    ordinary: Tensor
    sink: Tensor
    held: Tensor
    limit: float


def held_out(sequence: Tensor, sequences: int) -> Tensor:
    """Which rows choose the ridge instead of fitting: every eighth sequence, or the last of fewer."""
    every = min(HELD_OUT_EVERY, sequences)
    return sequence % every == every - 1


def fit_block(
    station: Station, settings: FitSettings, given: Gaussian | None = None, cache_bytes: int = 0
) -> FittedBlock:
    """The least-squares optimal polynomial of one block.

    Args:
        station: all passes waiting at the block; with the original stream where errors are to be made up for.
        given: distribution of the block's input for `assume="gaussian"`; measured where None.
        cache_bytes: memory that may be spent to keep hidden vectors, so that `outputs` come back.
    Raises:
        CalibrationError: too few tokens for the unknowns, or values that are not finite.
    """
    block = station.block
    original = Original.of(block, station.modules)
    sequences = 1 + max(int(arrival.sequence[-1]) for arrival in station.twin)
    sample = _take_sample(station, original, settings, sequences)
    inputs = InputMoments.of(sample.x[sample.ordinary])
    at = Preactivations.of(inputs, original.gate, original.up)
    moments = _moments(original, at, sample, settings, given)
    units = solve_units(moments)
    if settings.guard and settings.degree == 2 and units.b is not None:
        units = guarded(moments, units)
    pointing = sinks.directions(inputs, sample.x[sample.sink]) if settings.degree > 1 else _none_like(inputs)
    gate = standardised(*original.gate, at.y_mean, at.y_std)
    up = None
    if original.up is not None:
        assert at.z_mean is not None and at.z_std is not None
        up = standardised(*original.up, at.z_mean, at.z_std)
    gate, up, units = _with_sink_units(gate, up, units, pointing)
    prior = _prior(original, units, gate, up, settings.degree)
    twin = _Features(gate, up, units, settings.degree, sample.x.dtype)

    choice: Readout | None = None
    outputs: tuple[Tensor, ...] | None = None
    if settings.refit:
        solution, choice, outputs = _refit(station, original, twin, prior, sample, len(pointing.bias), cache_bytes)
    else:
        solution = _with_sink_columns(prior, twin, sample, len(pointing.bias))
    readout = Affine(solution[:-1].T.contiguous(), solution[-1])
    predicted = _chunked(sample.x, lambda rows: twin(rows) @ solution.to(rows))
    return FittedBlock(
        block=block,
        degree=settings.degree,
        gate=gate if settings.degree > 1 else None,
        up=up if settings.degree > 1 else None,
        units=units if settings.degree > 1 else None,
        readout=readout,
        r2_fit=_r2(predicted, sample.output, sample.ordinary & ~sample.held),
        r2_held=_r2(predicted, sample.output, sample.ordinary & sample.held),
        r2_units=float(units.r2.median()),
        ridge=choice.ridge if choice else None,
        condition=max(units.condition, choice.condition if choice else 0.0),
        sink_tokens=int(sample.sink.sum()),
        sink_error=_relative(predicted[sample.sink], sample.output[sample.sink]),
        quadrature_error=units.error,
        tokens=sum(int(arrival.keep.sum()) for arrival in station.twin),
        outputs=outputs,
    )


def _take_sample(station: Station, original: Original, settings: FitSettings, sequences: int) -> _Sample:
    """Evenly spread batches, until there are enough tokens for the units (always several per input dimension)."""
    arrivals = station.twin
    wanted = max(settings.unit_tokens, 4 * station.block.width)
    step = max(1, len(arrivals) * len(arrivals[0].x) // wanted)
    chosen = arrivals[::step]
    keep = torch.cat([arrival.keep for arrival in chosen])
    x = torch.cat([arrival.x for arrival in chosen])[keep]
    size = torch.cat([arrival.size for arrival in chosen])[keep]
    held = held_out(torch.cat([arrival.sequence for arrival in chosen])[keep], sequences)
    unknowns = 2 * settings.degree + 1
    if len(x) < TOKENS_PER_UNKNOWN * unknowns:
        raise CalibrationError(
            f"{len(x)} tokens are too few for the {unknowns} coefficients of a unit",
            where=station.block.path,
            cause=f"at least {TOKENS_PER_UNKNOWN} tokens per coefficient are needed",
            fix="give more calibration text or tokens, or a lower degree",
        )
    y, z = original.preactivations(x)
    output = _chunked(x, original)
    if not bool(torch.isfinite(output).all()):
        raise CalibrationError("the block's output holds NaN or infinite values", where=station.block.path)
    total = (size.square() + output.float().norm(dim=-1).square()).sqrt()
    limit = sinks.threshold(total)
    sink = total > limit
    if bool(held.all()) or not bool(held.any()):
        held = torch.arange(len(held), device=held.device) % HELD_OUT_EVERY == 0
    return _Sample(x, y, z, output, ~sink, sink, held, limit)


def _moments(
    original: Original, at: Preactivations, sample: _Sample, settings: FitSettings, given: Gaussian | None
) -> UnitMoments:
    degree = settings.degree

    def gaussian(moments: InputMoments, weight: float) -> UnitMoments:
        return from_gaussian(
            original.activation, at, Preactivations.of(moments, original.gate, original.up), degree, weight
        )

    if given is not None:
        parts = [
            gaussian(InputMoments.gaussian(mean, covariance), float(weight))
            for weight, mean, covariance in zip(given.weights, given.means, given.covariances, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    if settings.assume == "gaussian":
        return from_gaussian(original.activation, at, at, degree)
    rows = sample.ordinary
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


def _none_like(inputs: InputMoments) -> Affine:
    return Affine(inputs.total.new_zeros(0, len(inputs.total)), inputs.total.new_zeros(0))


def _with_sink_units(
    gate: Affine, up: Affine | None, units: UnitPolynomials, pointing: Affine
) -> tuple[Affine, Affine | None, UnitPolynomials]:
    extra = len(pointing.bias)
    if not extra:
        return gate, up, units
    gate = Affine(torch.cat([gate.weight, pointing.weight]), torch.cat([gate.bias, pointing.bias]))
    if up is not None:
        up = Affine(
            torch.cat([up.weight, torch.zeros_like(pointing.weight)]),
            torch.cat([up.bias, torch.zeros_like(pointing.bias)]),
        )
    squares = units.a.new_zeros(extra, units.a.shape[1])
    squares[:, 2] = 1
    a = torch.cat([units.a, squares])
    b = None if units.b is None else torch.cat([units.b, units.b.new_zeros(extra, units.b.shape[1])])
    r2 = torch.cat([units.r2, units.r2.new_ones(extra)])
    return gate, up, UnitPolynomials(a, b, r2, units.condition, units.error)


class _Features:
    """x ↦ (hidden vector of the polynomial, 1); for degree 1, (x, 1)."""

    def __init__(
        self, gate: Affine, up: Affine | None, units: UnitPolynomials, degree: int, dtype: torch.dtype
    ) -> None:
        self.degree = degree
        self.gate = (gate.weight.to(dtype), gate.bias.to(dtype))
        self.up = None if up is None else (up.weight.to(dtype), up.bias.to(dtype))
        b = None if units.b is None else units.b.to(dtype)
        self.units = UnitPolynomials(units.a.to(dtype), b, units.r2, units.condition)

    def __call__(self, x: Tensor) -> Tensor:
        if self.degree == 1:
            return torch.cat([x, x.new_ones(len(x), 1)], dim=-1)
        u = nn.functional.linear(x, *self.gate)
        hidden = self.units(u, None if self.up is None else nn.functional.linear(x, *self.up))
        return torch.cat([hidden, hidden.new_ones(len(x), 1)], dim=-1)


def _prior(original: Original, units: UnitPolynomials, gate: Affine, up: Affine | None, degree: int) -> Tensor:
    """The original readout on the features, (p, out) float64; sink units and, for degree 1, units folded in."""
    weight, bias = original.down
    down = weight.double()
    offset = down.new_zeros(len(down)) if bias is None else bias.double()
    if degree == 1:
        linear = units.a[:, 1, None] * gate.weight
        constant = units.a[:, 0] + units.a[:, 1] * gate.bias
        if up is not None and units.b is not None:
            linear = linear + units.b[:, 0, None] * up.weight
            constant = constant + units.b[:, 0] * up.bias
        return torch.cat([(down @ linear).T, (offset + down @ constant)[None]])
    extra = len(units.a) - down.shape[1]
    return torch.cat([down.T, down.new_zeros(extra, len(down)), offset[None]])


def _with_sink_columns(prior: Tensor, twin: _Features, sample: _Sample, extra: int) -> Tensor:
    """The kept readout, with the sink units' columns set to what is missing at the sinks (least squares)."""
    if not extra:
        return prior
    features = twin(sample.x[sample.sink]).double()
    missing = sample.output[sample.sink].double() - features @ prior
    columns = torch.linalg.lstsq(features[:, -1 - extra : -1], missing, driver="gelsd").solution
    result = prior.clone()
    result[-1 - extra : -1] = columns
    return result


@dataclass(frozen=True)
class _Rows:
    """A chunk of real tokens of one batch, ready for the normal equations."""

    features: Tensor
    target: Tensor
    weight: Tensor
    sink: Tensor
    held: Tensor


def _refit(
    station: Station, original: Original, twin: _Features, prior: Tensor, sample: _Sample, extra: int, cache_bytes: int
) -> tuple[Tensor, Readout, tuple[Tensor, ...] | None]:
    """Ridge regression of what the block should write on the polynomial's hidden vector.

    Tokens are weighted by 1/‖residual‖², since what reads the residual stream normalises it first. The sinks
    together weigh as much as all other tokens by that measure.
    """
    tokens = sum(len(arrival.x) for arrival in station.twin)
    hold = tokens * prior.shape[0] * sample.x.element_size() <= cache_bytes and station.block.kind != "plain"
    sequences = 1 + max(int(arrival.sequence[-1]) for arrival in station.twin)
    sums: dict[str, RidgeSums] = {}
    kept: list[list[Tensor]] = []
    boost = float(sample.ordinary.sum()) / max(1, int(sample.sink.sum()))
    typical = torch.cat([arrival.size[arrival.keep] for arrival in station.twin]).median()
    for number, arrival in enumerate(station.twin):
        kept.append([])
        other = station.original[number] if station.original else None
        for start in range(0, len(arrival.x), CHUNK):
            rows = slice(start, start + CHUNK)
            features = twin(arrival.x[rows])
            if hold:
                kept[number].append(features)
            target = _target(original, arrival, other, rows)
            size = arrival.size[rows]
            total = (size.square() + target.float().norm(dim=-1).square()).sqrt()
            sink = total > sample.limit
            weight = torch.ones_like(size)
            if station.block.additive:
                weight = (typical / size.clamp_min(1e-6 * typical)).square().clamp_max(100.0)
            weight = torch.where(sink, boost * (typical / total).square(), weight)
            held = held_out(arrival.sequence[rows], sequences)
            for name, chosen in (("sink", sink), ("held", held & ~sink), ("fit", ~held & ~sink)):
                use = chosen & arrival.keep[rows]
                if bool(use.any()):
                    root = weight[use].sqrt().to(features)[:, None]
                    part = RidgeSums.of(features[use] * root, target[use] * root)
                    if name in sums:
                        sums[name].add_(part)
                    else:
                        sums[name] = part
    if "fit" not in sums or "held" not in sums:
        raise CalibrationError("no tokens are left to fit on", where=station.block.path, fix="give more text")
    choice = ridge_path(sums["fit"], sums["held"], prior, anchor=sums.get("sink"), free=extra + 1)
    solution = choice.weight.to(sample.x)
    outputs = tuple(torch.cat([part @ solution for part in parts]) for parts in kept) if hold else None
    return choice.weight, choice, outputs


def _target(original: Original, arrival: Arrival, other: Arrival | None, rows: slice) -> Tensor:
    """What the block should write: its own output, or what brings the residual stream back to the original's."""
    if other is None or other.residual is None or arrival.residual is None:
        return original(arrival.x[rows])
    return original(other.x[rows]) + (other.residual[rows] - arrival.residual[rows])


def _chunked(x: Tensor, function: object) -> Tensor:
    assert callable(function)
    return torch.cat([function(part) for part in x.split(CHUNK)])


def _r2(predicted: Tensor, truth: Tensor, rows: Tensor) -> float:
    p, t = predicted[rows].double(), truth[rows].double()
    return float(1 - (p - t).square().sum() / (t - t.mean(0)).square().sum().clamp_min(1e-300))


def _relative(predicted: Tensor, truth: Tensor) -> float:
    if not len(truth):
        return 0.0
    return float((predicted.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300))
