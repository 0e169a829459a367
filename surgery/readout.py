"""The last map of a block, re-solved (or kept, and completed at the sinks)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.errors import CalibrationError
from surgery.features import Features, Original
from surgery.lstsq import Readout, RidgeSums, ridge_path
from surgery.stream import Arrival, Station

CHUNK = 2048  # tokens whose hidden vectors are held at once
HELD_OUT_SHARE = 8  # the last eighth of the sequences chooses the ridge; whole texts, so that it is honest
YOUNG_SINKS = 0.1  # weight of sinks that are not massive yet, all together, against all other tokens
MISTAKEN = 0.2  # of a sink unit's answer at its sink
WEIGHT_LIMIT = 100.0  # of a token with a small residual, against the typical one


@dataclass(frozen=True)
class Refit:
    """The re-solved map, and what was computed on the way.

    Attributes:
        choice: weights and the ridge.
        outputs, written: what the twin's and the original's block write to each batch; empty where not computed.
    """

    choice: Readout
    outputs: tuple[Tensor, ...]
    written: tuple[Tensor, ...]


def held_out(sequence: Tensor, sequences: int) -> Tensor:
    """Which rows choose the ridge instead of fitting: those of the last eighth of the sequences, at least one."""
    return sequence >= sequences - max(1, sequences // HELD_OUT_SHARE)


def refit(
    station: Station,
    original: Original,
    twin: Features,
    prior: Tensor,
    *,
    sink_limit: float,
    sink_boost: float,
    sink_units: int,
    cache_bytes: int,
) -> Refit:
    """Ridge regression of what the block should write on the polynomial's hidden vector.

    The target is the original block's output on the twin's stream, or, with the original stream at hand, what
    brings the twin's residual stream back to the original's: f(x₀) + r₀ − r (at sinks only in a block that writes
    them: elsewhere a small relative difference would be huge). Tokens are weighted by 1/‖r‖², since whatever reads
    the residual stream normalises it first; the sinks together weigh as much as all other tokens do.

    Args:
        prior: readout that the ridge pulls towards, (p, out).
        sink_limit: norm from which on a token is a sink.
        sink_boost: number of ordinary tokens per sink token.
        sink_units: how many features before the constant belong to sinks.
        cache_bytes: memory that may be spent on keeping hidden vectors until the answer is known.
    """
    block = station.block
    tokens = sum(len(arrival.x) for arrival in station.twin)
    whole = block.kind != "plain"  # else the passes wait inside the block and finish it themselves
    hold = whole and tokens * prior.shape[0] * station.twin[0].x.element_size() <= cache_bytes
    sequences = 1 + max(int(arrival.sequence[-1]) for arrival in station.twin)
    typical = torch.cat([arrival.size[arrival.keep] for arrival in station.twin]).median()
    sums: dict[str, RidgeSums] = {}
    at_sinks: list[tuple[Tensor, Tensor]] = []
    hidden: list[list[Tensor]] = [[] for _ in station.twin]
    written: list[list[Tensor]] = [[] for _ in station.twin]
    for number, arrival in enumerate(station.twin):
        other = station.original[number] if station.original else None
        for start in range(0, len(arrival.x), CHUNK):
            rows = slice(start, start + CHUNK)
            features = twin(arrival.x[rows])
            output = original((other or arrival).x[rows])
            if hold:
                hidden[number].append(features)
            if whole and other is not None:
                written[number].append(output)
            size = arrival.size[rows]
            total = (size.square() + output.float().norm(dim=-1).square()).sqrt()
            sink = (total > sink_limit) | arrival.known_sink[rows]
            target = output
            weight = torch.ones_like(size)
            if block.additive:
                if other is not None:
                    target = output + behind(arrival, other, rows)
                    if not sink_units:
                        target[sink] = original(arrival.x[rows][sink])
                weight = (typical / size.clamp_min(1e-6 * typical)).square().clamp_max(WEIGHT_LIMIT)
            share = torch.where(total > sink_limit, sink_boost, YOUNG_SINKS * sink_boost)
            weight = torch.where(sink, share * (typical / total).square(), weight)
            root = weight.sqrt().to(features)[:, None]
            real = arrival.keep[rows] & ~(mistaken(features, sink_units) & ~sink)
            held = held_out(arrival.sequence[rows], sequences)
            at_sinks.append((features[real & sink] * root[real & sink], target[real & sink] * root[real & sink]))
            for name, chosen in (("held", real & held & ~sink), ("fit", real & ~held & ~sink)):
                if bool(chosen.any()):  # a chunk is seldom divided, so rows of the other part get weight 0
                    masked = root * chosen[:, None]
                    part = RidgeSums.of(features * masked, target * masked)
                    if name in sums:
                        sums[name].add_(part)
                    else:
                        sums[name] = part
    if "fit" not in sums or "held" not in sums:
        raise CalibrationError("no tokens are left to fit on", where=block.path, fix="give more text")
    anchor = RidgeSums.of(torch.cat([f for f, _ in at_sinks]), torch.cat([t for _, t in at_sinks]))
    choice = ridge_path(sums["fit"], sums["held"], prior, anchor=anchor, free=sink_units + 1)
    solution = choice.weight.to(station.twin[0].x)
    return Refit(
        choice,
        tuple(torch.cat([part @ solution for part in parts]) for parts in hidden if parts),
        tuple(torch.cat(parts) for parts in written if parts),
    )


def mistaken(features: Tensor, sink_units: int) -> Tensor:
    """Tokens that a sink unit takes for its sink. One among the ordinary would cost the sink its reproduction."""
    return (features[:, -1 - sink_units : -1] > MISTAKEN).any(-1)


def behind(arrival: Arrival, other: Arrival, rows: slice | Tensor) -> Tensor | float:
    """How far the twin's residual stream is behind the original's."""
    if arrival.residual is None or other.residual is None:
        return 0.0
    return other.residual[rows] - arrival.residual[rows]


def fill_sink_columns(prior: Tensor, features: Tensor, output: Tensor, extra: int) -> Tensor:
    """The kept readout, with the sink units' columns set to what is missing at the sinks (least squares)."""
    if not extra:
        return prior
    missing = output.double() - features.double() @ prior
    columns = torch.linalg.lstsq(features[:, -1 - extra : -1].double(), missing, driver="gelsd").solution
    result = prior.clone()
    result[-1 - extra : -1] = columns
    return result
