"""A mixture of experts, one expert after another, each on the tokens routed to it.

An expert's output counts with its routing weight, so its errors are weighted by the weight squared. Where the residual
stream is the target, what earlier blocks got wrong is shared among a token's experts so that together they make up for
it: with y_t = Σ_j w_tj f_{e_tj}(x_t), adding c_t / Σ_j w_tj to each adds c_t.

An expert that saw too few tokens has units fitted on all tokens of its layer, whoever they were routed to, and keeps
its readout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.blocks import experts
from surgery.blocks.block import Block, ExpertsBlock
from surgery.calibration.arrivals import Station
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.errors import CalibrationError
from surgery.fitting.block import FitSettings, FittedBlock, fit_block
from surgery.fitting.sample import TOKENS_PER_UNKNOWN
from surgery.fitting.target import Target
from surgery.runtime import processes

HELD_TOKENS = 8  # fewer held-out tokens choose no ridge


@dataclass(frozen=True)
class FittedExperts:
    """Polynomials of all experts of a block.

    Attributes:
        experts: by number.
        tokens: how many calibration tokens each saw.
        starved: numbers of those that saw too few.
        outputs, written: nothing is computed on the way.
    """

    outputs: ClassVar[tuple[Tensor, ...]] = ()
    written: ClassVar[tuple[Tensor, ...]] = ()

    block: Block
    experts: tuple[FittedBlock, ...]
    tokens: tuple[int, ...]
    starved: tuple[int, ...]

    @property
    def polynomials(self) -> tuple[BlockPolynomial, ...]:
        return tuple(one.polynomial for one in self.experts)

    def row(self, seconds: float = 0.0) -> dict[str, Any]:
        """Its line in the report: sums of counts, else the median over the experts that saw enough tokens."""
        rows = [one.row() for number, one in enumerate(self.experts) if number not in self.starved]
        rows = rows or [one.row() for one in self.experts]
        summed = ("sink_tokens", "sink_units", "sink_mistaken")
        numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
        values = {key: [row[key] for row in rows] for key in numbers}
        return {
            "path": self.block.path,
            "kind": self.block.kind,
            "activation": self.block.activation,
            **{key: sum(value) if key in summed else median(value) for key, value in values.items()},
            "degree": self.polynomials[0].degree,
            "ridge": None,
            "tokens": sum(self.tokens),
            "seconds": round(seconds, 3),
            "experts": len(self.experts),
            "tokens_by_expert": list(self.tokens),
            "starved": list(self.starved),
        }


def fit_experts(station: Station, settings: FitSettings) -> FittedExperts:
    """The least-squares optimal polynomial of every expert.

    Raises:
        CalibrationError: too few tokens in all, or a unit that has no closed form under a Gaussian.
    """
    block = station.block
    module = station.modules[block.path]
    if settings.assume != "data" and experts.unit(module).joint is not None:
        raise CalibrationError(
            "these experts' units are functions of gate and up together, whose Gaussian moments are not known",
            where=block.path,
            fix="use assume: data",
        )
    corrections = _corrections(station, module)  # by batch, (tokens, out), per unit of routing weight
    least = TOKENS_PER_UNKNOWN * (2 * settings.degree + 1)
    kept = replace(settings, epochs=0) if settings.units < 1 else replace(settings, refit=False)
    prior_rows = _layer_sample(station, max(settings.unit_tokens, 4 * block.width))
    fitted: list[FittedBlock] = []
    tokens: list[int] = []
    starved: list[int] = []
    for number in range(experts.count(module)):
        original = experts.weights(module, number)
        mine, own = _part_of(station, number, corrections)
        seen = [sum(int((a.keep & (a.held == held)).sum()) for a in mine.twin) for held in (False, True)]
        fit, held = (int(processes.sum_number(tokens_here)) for tokens_here in seen)
        tokens.append(fit + held)
        if fit < least or held < HELD_TOKENS:
            starved.append(number)
            found = fit_block(prior_rows, kept, original=original)
        else:
            found = fit_block(mine, settings, original=original, corrections=own)
        # Maps in the precision they are stored in: all experts' in float64 would be the largest thing in memory.
        rounded = found.polynomial.to(station.twin[0].x.dtype)
        fitted.append(replace(found, polynomial=rounded, outputs=(), written=()))
    return FittedExperts(block, tuple(fitted), tuple(tokens), tuple(starved))


def _corrections(station: Station, module: Any) -> tuple[Tensor, ...]:
    """What the block should add beyond its own output on the twin's stream, per token and unit of routing weight."""
    if not station.original or station.block.residual is None:
        return ()
    found, target = [], Target.of(station)
    for number in range(len(station.twin)):
        arrival, other = target.arrivals(number)
        assert arrival.routing is not None and other.routing is not None
        own = experts.recomputed(module, arrival.x, arrival.routing)
        missing = target.wanted(number, slice(None), experts.recomputed(module, other.x, other.routing)) - own
        fitted = arrival.routing.index < experts.count(module)
        total = (arrival.routing.weight * fitted).sum(-1, keepdim=True).to(missing)
        found.append(missing / total.clamp_min(1e-6))
    return tuple(found)


def _part_of(station: Station, number: int, corrections: Sequence[Tensor]) -> tuple[Station, tuple[Tensor, ...]]:
    """The tokens routed to one expert, as if at a block of its own, and their corrections."""
    block = replace(_mixture(station).one(number), residual=station.block.residual if corrections else None)
    twin, own = [], []
    for batch, arrival in enumerate(station.twin):
        assert arrival.routing is not None
        rows, weight = arrival.routing.of_expert(number)
        rows, order = rows.sort()  # held-out rows stay last
        twin.append(arrival.at(rows, weight[order].float()))
        if corrections:
            own.append(corrections[batch][rows])
    return Station(block, station.modules, tuple(twin), (), station.number), tuple(own)


def _mixture(station: Station) -> ExpertsBlock:
    assert isinstance(station.block, ExpertsBlock)
    return station.block


def _layer_sample(station: Station, wanted: int) -> Station:
    """Some tokens of the whole layer."""
    share = min(1.0, wanted / processes.sum_number(sum(len(arrival.x) for arrival in station.twin)))
    block = replace(_mixture(station).one(0), path=station.block.path)
    step = max(1, math.floor(1 / share))
    sample = (a.at(torch.arange(0, len(a.x), step, device=a.x.device)) for a in station.twin)
    return Station(block, {}, tuple(sample), (), station.number)
