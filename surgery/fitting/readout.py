"""The last map of a block, re-solved (or kept, and completed at the sinks)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.calibration.arrivals import Station
from surgery.closed_form.ridge import HeldRows, RidgeSolution, RidgeSums, most_useful, ridge_path
from surgery.errors import CalibrationError
from surgery.fitting.features import HiddenPolynomial, RoundedHidden
from surgery.fitting.objective import Aim, mistaken, pieces
from surgery.runtime import processes


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


def refit(
    station: Station,
    aim_of: Callable[[int], Aim],
    twin: HiddenPolynomial | RoundedHidden,
    prior: Tensor,
    sink_units: int,
    counts: Tensor | None = None,
    cache_bytes: int = 0,
    units: int | None = None,
) -> Readout:
    """Ridge regression of what the block should write on the polynomial's hidden vector.

    The held-out sequences are fitted in no block: r₀ − r is smaller where the earlier blocks were fitted, which no
    ridge chosen there would know. A token that only the twin makes a sink does not count.

    Args:
        aim_of: what each batch is fitted to, by its number.
        prior: readout that the ridge pulls towards, (p, out).
        sink_units: how many features before the constant belong to sinks.
        counts: how much an error of each output counts, (out,); alike where None.
        cache_bytes: memory that may be spent on keeping hidden vectors until the solution is known.
        units: how many units to keep beside the sink units, the most useful ones; all where None.
    """
    block = station.block
    tokens = max(processes.gather(sum(len(arrival.x) for arrival in station.twin)))  # all hold them, or none does
    hold = block.whole and tokens * prior.shape[0] * station.twin[0].x.element_size() <= cache_bytes
    sums = _Sums.zeros(prior, station)
    hidden, written = _summed(twin, station, aim_of, sums, sink_units, hold)
    fit, held_rows, anchor = sums.over_processes()
    if not (float(fit.weight) and len(held_rows.features)):
        raise CalibrationError("no tokens are left to fit on", where=block.path, fix="give more text")
    free, kept = sink_units + 1, None
    if units is not None and units < len(prior) - free:
        kept = most_useful(fit, prior, units, free, counts=counts)
        fit, held_rows, prior = fit.at(kept), held_rows.at(kept), prior[kept]
        anchor = (anchor[0][:, kept], anchor[1])
        hidden = [[part[:, kept] for part in parts] for parts in hidden]
    choice = ridge_path(fit, held_rows, prior, anchor=anchor, free=free, counts=counts)
    solution = choice.weight.to(station.twin[0].x)
    rounded = isinstance(twin, RoundedHidden)
    outputs = (torch.cat([_written(part, solution, free, rounded) for part in parts]) for parts in hidden if parts)
    return Readout(choice, tuple(outputs), tuple(written), kept)


def _written(features: Tensor, solution: Tensor, free: int, rounded: bool) -> Tensor:
    """What the polynomial writes; multiplied in bfloat16 but for sink units and the constant, where `rounded`."""
    if not rounded:
        return features @ solution
    products = features[:, :-free].bfloat16() @ solution[:-free].bfloat16()
    return torch.addmm(products.to(solution), features[:, -free:], solution[-free:])


def _summed(
    twin: HiddenPolynomial | RoundedHidden,
    station: Station,
    aim_of: Callable[[int], Aim],
    sums: _Sums,
    sink_units: int,
    hold: bool,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Adds all tokens to the sums; by batch: hidden vectors where they are to be held, and what the original writes
    where its stream runs too."""
    hidden: list[list[Tensor]] = [[] for _ in station.twin]
    written: list[Tensor] = []
    for number, arrival in enumerate(station.twin):
        aim = aim_of(number)
        if station.block.whole and station.original:  # else the passes wait inside and finish it themselves
            written.append(aim.output)
        for rows, held in pieces(arrival):
            features, part = twin(arrival.x[rows]), aim.at(rows)
            if hold:
                hidden[number].append(features)
            root = part.weight.sqrt().to(features)[:, None]
            real = arrival.keep[rows] & ~(mistaken(features[:, -1 - sink_units : -1]) & ~part.sink)
            sums.add(features * root, part.wanted * root, real, part.sink, held)
    return hidden, written


def kept_readout(prior: Tensor, features: Tensor, output: Tensor, extra: int) -> Readout:
    """The original's map, with the sink units' columns set to what is missing at the sinks (least squares)."""
    solution = prior.clone()
    if extra:
        missing = output.double() - features.double() @ prior
        at_sinks = features[:, -1 - extra : -1].double()
        solution[-1 - extra : -1] = torch.linalg.lstsq(at_sinks, missing, driver="gelsd").solution
    return Readout(RidgeSolution(solution, None, 0.0), (), ())
