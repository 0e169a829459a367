"""The last map of a block, re-solved (or kept, and completed at the sinks)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.blocks.weights import BlockWeights
from surgery.calibration.arrivals import Arrival, Station
from surgery.closed_form.ridge import HeldRows, RidgeSolution, RidgeSums, most_useful, ridge_path
from surgery.errors import CalibrationError
from surgery.fitting.features import HiddenPolynomial
from surgery.fitting.sample import Sample
from surgery.fitting.target import Target
from surgery.runtime import processes

CHUNK = 2048  # tokens whose hidden vectors are held at once
YOUNG_SINKS = 0.1  # weight of sinks that are not massive yet, all together, against all other tokens
MISTAKEN = 0.2  # of a sink unit's output at its sink
WEIGHT_LIMIT = 100.0  # of a token with a small residual, against the typical one


@dataclass(frozen=True)
class Readout:
    """The re-solved map, and what was computed on the way.

    Attributes:
        choice: weights and the ridge.
        outputs, written: what the twin's and the original's block write to each batch; empty where not computed.
        kept: numbers of the features that `choice` is for, the constant last; None for all.
    """

    choice: RidgeSolution
    outputs: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    kept: Tensor | None = None


@dataclass(frozen=True)
class _Sums:
    """What the readout is solved from; rows come scaled by the root of their weight.

    Attributes:
        fit: sums over what is fitted on.
        held: rows of the held-out sequences, every `step`-th: no more memory than the sums take.
        sinks: rows at attention sinks, which are few and belong to every fit.
    """

    fit: RidgeSums
    held: list[tuple[Tensor, ...]]
    step: int
    sinks: list[tuple[Tensor, ...]]

    @staticmethod
    def zeros(prior: Tensor, station: Station) -> _Sums:
        tokens = processes.sum_number(sum(int((arrival.held & arrival.keep).sum()) for arrival in station.twin))
        nothing = station.twin[0].x.new_zeros(0, sum(prior.shape)).split(prior.shape, dim=1)
        sums = RidgeSums.zeros(prior.shape[0], prior.shape[1], prior.device)
        return _Sums(sums, [nothing], max(1, math.ceil(tokens / (2 * len(prior)))), [nothing])

    def add(self, features: Tensor, targets: Tensor, real: Tensor, sink: Tensor, held: bool) -> None:
        """Rows of which those that are not `real` do not count."""
        self.sinks.append((features[real & sink], targets[real & sink]))
        ordinary = real & ~sink
        if held:
            some = ordinary.nonzero()[:: self.step, 0]
            self.held.append((features[some], targets[some]))
        else:
            self.fit.add_rows(features * ordinary[:, None], targets * ordinary[:, None])

    def over_processes(self) -> tuple[RidgeSums, HeldRows, tuple[Tensor, Tensor]]:
        """The sums, the held-out rows and the sinks of all processes."""
        for part in self.fit.parts():
            processes.total(part)
        held, sinks = (
            [processes.together(torch.cat(rows)) for rows in zip(*kept, strict=True)]
            for kept in (self.held, self.sinks)
        )
        return self.fit, HeldRows(held[0], held[1]), (sinks[0], sinks[1])


@dataclass(frozen=True)
class _Objective:
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

    def of(self, number: int, rows: slice, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Target (n, out), weight (n,) and which rows are sinks (n,), of some rows of a batch.

        Args:
            output: what the original block writes there, in its own stream where that runs.
        """
        arrival, other = self.target.arrivals(number)
        size = torch.maximum(arrival.size[rows], other.size[rows])
        total = (other.size[rows].square() + self.target.reaching(output).square()).sqrt()
        massive = total > self.sink_limit
        sink = massive | arrival.known_sink[rows]
        wanted, weight = self.target.wanted(number, rows, output), torch.ones_like(size)
        if self.target.in_stream:
            if not self.writer and wanted is not output:
                wanted[sink] = self.original(arrival.x[rows][sink])
            weight = (self.typical / size.clamp_min(1e-6 * self.typical)).square().clamp_max(WEIGHT_LIMIT)
            length = self.target.lengths(output).clamp_min(1e-6 * self.length)
            weight = weight * (self.length / length).square().clamp_max(WEIGHT_LIMIT)
        share = torch.where(massive, self.sink_boost, YOUNG_SINKS * self.sink_boost)
        weight = torch.where(sink, share * (self.typical / total).square(), weight)
        if arrival.weight is not None:
            weight = weight * arrival.weight[rows].square()
        return wanted, weight, sink


def refit(
    target: Target,
    original: BlockWeights,
    twin: HiddenPolynomial,
    prior: Tensor,
    sample: Sample,
    sink_units: int,
    cache_bytes: int = 0,
    units: int | None = None,
) -> Readout:
    """Ridge regression of what the block should write (:class:`_Objective`) on the polynomial's hidden vector.

    The held-out sequences are fitted in no block: r₀ − r is smaller where the earlier blocks were fitted, which no
    ridge chosen there would know. A token that only the twin makes a sink does not count.

    Args:
        prior: readout that the ridge pulls towards, (p, out).
        sample: says from which norm on a token is a sink, and how much the sinks weigh.
        sink_units: how many features before the constant belong to sinks.
        cache_bytes: memory that may be spent on keeping hidden vectors until the solution is known.
        units: how many units to keep beside the sink units, the most useful ones; all where None.
    """
    station, block = target.station, target.station.block
    tokens = sum(len(arrival.x) for arrival in station.twin)
    hold = block.whole and tokens * prior.shape[0] * station.twin[0].x.element_size() <= cache_bytes
    typical = processes.together(torch.cat([arrival.size[arrival.keep] for arrival in station.twin])).median()
    length = target.lengths(sample.output[sample.ordinary]).median()
    objective = _Objective(original, target, typical, length, sample.limit, sample.sink_boost, writer=sink_units > 0)
    sums = _Sums.zeros(prior, station)
    hidden, written = _summed(twin, objective, sums, sink_units, hold)
    fit, held_rows, anchor = sums.over_processes()
    if not (float(fit.weight) and len(held_rows.features)):
        raise CalibrationError("no tokens are left to fit on", where=block.path, fix="give more text")
    free, kept = sink_units + 1, None
    if units is not None and units < len(prior) - free:
        kept = most_useful(fit, prior, units, free, counts=target.counts)
        fit, held_rows, prior = fit.at(kept), held_rows.at(kept), prior[kept]
        anchor = (anchor[0][:, kept], anchor[1])
        hidden = [[part[:, kept] for part in parts] for parts in hidden]
    choice = ridge_path(fit, held_rows, prior, anchor=anchor, free=free, counts=target.counts)
    solution = choice.weight.to(station.twin[0].x)
    outputs = (torch.cat([part @ solution for part in parts]) for parts in hidden if parts)
    return Readout(choice, tuple(outputs), tuple(torch.cat(parts) for parts in written if parts), kept)


def _summed(
    twin: HiddenPolynomial, objective: _Objective, sums: _Sums, sink_units: int, hold: bool
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Adds all tokens to the sums; by batch: hidden vectors where they are to be held, and what the original writes."""
    station = objective.target.station
    hidden: list[list[Tensor]] = [[] for _ in station.twin]
    written: list[list[Tensor]] = [[] for _ in station.twin]
    for number in range(len(station.twin)):
        arrival, other = objective.target.arrivals(number)
        for rows, held in _pieces(arrival):
            features, output = twin(arrival.x[rows]), objective.original(other.x[rows])
            if hold:
                hidden[number].append(features)
            if station.block.whole and other is not arrival:  # else the passes wait inside and finish it themselves
                written[number].append(output)
            target, weight, sink = objective.of(number, rows, output)
            root = weight.sqrt().to(features)[:, None]
            real = arrival.keep[rows] & ~(mistaken(features[:, -1 - sink_units : -1]) & ~sink)
            sums.add(features * root, target * root, real, sink, held)
    return hidden, written


def _pieces(arrival: Arrival) -> Iterator[tuple[slice, bool]]:
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


def kept_readout(prior: Tensor, features: Tensor, output: Tensor, extra: int) -> Readout:
    """The original's map, with the sink units' columns set to what is missing at the sinks (least squares)."""
    solution = prior.clone()
    if extra:
        missing = output.double() - features.double() @ prior
        at_sinks = features[:, -1 - extra : -1].double()
        solution[-1 - extra : -1] = torch.linalg.lstsq(at_sinks, missing, driver="gelsd").solution
    return Readout(RidgeSolution(solution, None, 0.0), (), ())
