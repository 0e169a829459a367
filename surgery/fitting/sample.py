"""The tokens that a block's units are fitted on, and what is known of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.blocks.weights import BlockWeights
from surgery.calibration.arrivals import Arrival, Station
from surgery.closed_form import sinks
from surgery.errors import CalibrationError
from surgery.fitting.target import Target
from surgery.runtime import processes

TOKENS_PER_UNKNOWN = 20
CHUNK = 2048  # tokens whose hidden vectors are held at once


@dataclass(frozen=True)
class Sample:
    """What the first pass looks at.

    Attributes:
        rows: of each batch, by number; all else is of these rows of all processes, (tokens, …).
        x: the block's input.
        output, size: what the original writes there, and the norm of the residual stream before it.
        reaching: norm of what the output adds to the stream.
        ordinary, sink, held, massive: which rows are no sinks, are sinks in the original, are held out, and are
            massive in the twin.
        limit: norm from which on a token is a sink.
        aim: what the block should write at the sinks, (sinks, out).
    """

    rows: tuple[Tensor, ...]
    x: Tensor
    output: Tensor
    size: Tensor
    reaching: Tensor
    ordinary: Tensor
    sink: Tensor
    held: Tensor
    massive: Tensor
    limit: float
    aim: Tensor

    @property
    def sink_boost(self) -> float:
        """Ordinary tokens per sink."""
        return float(self.ordinary.sum()) / max(1, int(self.sink.sum()))


def take_sample(target: Target, original: BlockWeights, degree: int, tokens: int, sink_limit: float) -> Sample:
    """About `tokens` tokens, drawn from all batches alike (always several per input dimension).

    Args:
        sink_limit: from how many times the median norm on a token is a sink's.
    Raises:
        CalibrationError: too few for a unit of this degree, or an output that is not finite.
    """
    station = target.station
    rows = _drawn(station, max(tokens, 4 * station.block.width))

    def gathered(name: str, arrivals: tuple[Arrival, ...] = station.twin) -> Tensor:
        return processes.together(
            torch.cat([getattr(arrival, name)[at] for arrival, at in zip(arrivals, rows, strict=True)])
        )

    x, size, held = gathered("x"), gathered("size"), gathered("held")
    unknowns = 2 * degree + 1
    if len(x) < TOKENS_PER_UNKNOWN * unknowns:
        raise CalibrationError(
            f"{len(x)} tokens are too few for the {unknowns} coefficients of a unit",
            where=station.block.path,
            cause=f"at least {TOKENS_PER_UNKNOWN} tokens per coefficient are needed",
            fix="give more calibration text or tokens, or a lower degree",
        )
    output = processes.together(torch.cat([original(part) for part in processes.own_rows(x).split(CHUNK)]))
    if not bool(torch.isfinite(output).all()):
        raise CalibrationError("the block's output holds NaN or infinite values", where=station.block.path)
    norm = target.reaching(output)
    total = (size.square() + norm.square()).sqrt()
    limit = sinks.threshold(total, sink_limit)
    truly = gathered("size", station.original or station.twin)
    sink = ((truly.square() + norm.square()).sqrt() > limit) | gathered("known_sink")
    aim = output[sink]
    if target.in_stream:
        own = [len(at) for at in rows]
        before = sum(processes.gather(sum(own))[: processes.rank()])
        parts = sink[before : before + sum(own)].split(own)
        chosen = [at[part] for at, part in zip(rows, parts, strict=True)]
        aims = [
            target.wanted(number, at, original(target.arrivals(number)[1].x[at])) for number, at in enumerate(chosen)
        ]
        aim = processes.together(torch.cat(aims))
    return Sample(rows, x, output, size, norm, ~sink, sink, held, total > limit, limit, aim)


def _drawn(station: Station, wanted: int) -> tuple[Tensor, ...]:
    """Row numbers, ascending, of about `wanted` real tokens: the same share of every batch, the same in every run."""
    real = [arrival.keep.nonzero()[:, 0] for arrival in station.twin]
    share = min(1.0, wanted / max(1, processes.sum_number(sum(len(rows) for rows in real))))
    drawn = []
    for number, rows in enumerate(real, start=station.number):
        drawn.append(rows[some_of(len(rows), share, number).to(rows.device)])
    return tuple(drawn)


def some_of(count: int, share: float, seed: int) -> Tensor:
    """Numbers of a share of `count` rows, ascending, the same in every run."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: math.ceil(share * count)].sort().values
