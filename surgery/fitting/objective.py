"""What a block should write at each token, and how much the token counts for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.blocks.weights import BlockWeights
from surgery.calibration.arrivals import Arrival
from surgery.fitting.sample import CHUNK, Sample
from surgery.fitting.target import Target
from surgery.runtime import processes

YOUNG_SINKS = 0.1  # weight of sinks that are not massive yet, all together, against all other tokens
MISTAKEN = 0.2  # of a sink unit's output at its sink
WEIGHT_LIMIT = 100.0  # of a token with a small residual, against the typical one


class Aim(NamedTuple):
    """One batch's tokens as a fit sees them.

    Attributes:
        wanted, output: what the block should write, and what the original's writes (in its own stream where that runs),
            (tokens, out).
        weight: how much each counts, (tokens,).
        sink, massive: which are attention sinks, and which of these are massive by now.
    """

    wanted: Tensor
    output: Tensor
    weight: Tensor
    sink: Tensor
    massive: Tensor

    def at(self, rows: slice | Tensor) -> Aim:
        """Of some of the tokens."""
        return Aim(*(part[rows] for part in self))


@dataclass(frozen=True)
class Objective:
    """What the block should write, and which tokens count how much for it.

    At sinks the stream is the target only in a block that writes them: elsewhere a small relative difference would be
    huge. Tokens are weighted by 1/‖r‖², since whatever reads the residual stream normalises it first (and by how much
    an error counts after a norm of the block's own); the sinks together weigh as much as all other tokens do. A sink is
    what is one in the original.

    Attributes:
        typical: median norm of the residual stream.
        length: median of what the block's output is divided by on its way into the stream.
        sink_limit: norm from which on a token is a sink.
        sink_boost: number of ordinary tokens per sink token.
        writer: whether the block writes what makes its sinks massive.
    """

    original: BlockWeights
    target: Target
    typical: Tensor
    length: Tensor
    sink_limit: float
    sink_boost: float
    writer: bool

    @staticmethod
    def of(original: BlockWeights, target: Target, sample: Sample, writer: bool) -> Objective:
        """As the sample has it: from which norm on a token is a sink, and how much the sinks weigh."""
        sizes = (arrival.size[arrival.keep] for arrival in target.station.twin)
        typical = processes.together(torch.cat(list(sizes))).median()
        length = target.lengths(sample.output[sample.ordinary]).median()
        return Objective(original, target, typical, length, sample.limit, sample.sink_boost, writer)

    def batch(self, number: int) -> Aim:
        """Of all tokens of a batch."""
        arrival, other = self.target.arrivals(number)
        parts = [self.original(other.x[rows]) for rows, _ in pieces(arrival)]
        output = torch.cat(parts or [self.original(other.x)])  # an expert may have no tokens in a batch
        size = torch.maximum(arrival.size, other.size)
        total = (other.size.square() + self.target.reaching(output).square()).sqrt()
        massive = total > self.sink_limit
        sink = massive | arrival.known_sink
        wanted, weight = self.target.wanted(number, slice(None), output), torch.ones_like(size)
        if self.target.in_stream:
            if not self.writer and wanted is not output:
                wanted[sink] = self.original(arrival.x[sink])
            weight = (self.typical / size.clamp_min(1e-6 * self.typical)).square().clamp_max(WEIGHT_LIMIT)
            length = self.target.lengths(output).clamp_min(1e-6 * self.length)
            weight = weight * (self.length / length).square().clamp_max(WEIGHT_LIMIT)
        share = torch.where(massive, self.sink_boost, YOUNG_SINKS * self.sink_boost)
        weight = torch.where(sink, share * (self.typical / total).square(), weight)
        if arrival.weight is not None:
            weight = weight * arrival.weight.square()
        return Aim(wanted, output, weight, sink, massive)


def pieces(arrival: Arrival) -> Iterator[tuple[slice, bool]]:
    """Slices of at most CHUNK rows, each wholly held out or wholly not."""
    border = int((~arrival.held).sum())
    for begin, end, held in ((0, border, False), (border, len(arrival.x), True)):
        for start in range(begin, end, CHUNK):
            yield slice(start, min(start + CHUNK, end)), held


def mistaken(outputs: Tensor) -> Tensor:
    """Tokens that a sink unit takes for its sink. One among the ordinary would cost the sink its reproduction.

    Args:
        outputs: of the sink units, (tokens, sink units).
    """
    return (outputs > MISTAKEN).any(-1)
