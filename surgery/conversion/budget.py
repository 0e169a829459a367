"""A budget instead of a switch: per block degree 2, degree 3 or the original, within so many nats.

One pass over the blocks measures what each costs: every block is fitted on the original's own stream, at degree 2 and
at degree 3, put in alone, and its predictions of held-out calibration tokens are compared with the original's. Costs
are divergences KL(original ‖ changed): never below zero, and far less noisy than differences of losses. Taking them to
add up, the largest number of quadratic blocks that fits is the cheapest ones', and what is left goes to cubic ones.

Costs do not quite add up (later blocks make up for earlier ones, errors meet), so the whole is converted and its loss
measured: what sum of costs the budget stands for is learnt from what the sums tried came to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from surgery.blocks.parts import attribute
from surgery.calibration.held_out import fitted_sequences
from surgery.calibration.passes import Passes
from surgery.conversion.partial_run import PartialRun
from surgery.conversion.replacement import replace_blocks
from surgery.conversion.task import ConversionTask, Replacements, put_back
from surgery.errors import ModelError
from surgery.fitting.either import fit
from surgery.runtime import processes
from surgery.runtime.progress import Progress
from surgery.saving.modules import modules_for

DEGREES = (2, 3)
ORIGINAL = 0
COST_TOKENS = 2048
TRIES = 6
ENOUGH = 0.8  # of the budget used; less is worth another try
AIM = 0.9  # of the budget, for a choice that is to stay within it
STEEPNESS = (0.5, 3.0)  # of what is lost against the sum of costs, both as logarithms, as far as it is believed

Batches = Sequence[Mapping[str, Tensor]]
Nats = Callable[[Any, Batches], float]
Divergence = Callable[[Any, Batches], Callable[[Any], float]]
"""Of a model as it is and batches: what measures how far a changed model's predictions are from it."""


@dataclass(frozen=True)
class BlockCost:
    """KL(original ‖ model in which this block alone is replaced), nats, by degree."""

    path: str
    divergence: dict[int, float]


@dataclass(frozen=True)
class Budget:
    """What was chosen, and what it came to.

    Attributes:
        nats: the budget.
        costs: of every block alone.
        degrees: chosen, by path; 0 is the original block.
        predicted: sum of the costs of what was chosen.
        measured: nats lost by the whole, on the same tokens as `tried`.
        tried: (number of quadratic blocks, number of cubic ones, sum of costs, nats) of each attempt.
        tokens: how many tokens costs were measured on.
    """

    nats: float
    costs: tuple[BlockCost, ...]
    degrees: dict[str, int]
    predicted: float
    measured: float
    tried: tuple[tuple[int, int, float, float], ...]
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def degrees_within(costs: Sequence[BlockCost], allowed: float) -> dict[str, int]:
    """Degrees by path: as many quadratic blocks as the allowance takes, then as many cubic ones.

    With costs that add up no other choice has more quadratic blocks.
    """
    degrees = {cost.path: ORIGINAL for cost in costs}
    left = allowed
    for degree in DEGREES:
        prices = {cost.path: cost.divergence[degree] for cost in costs}
        for path in sorted(prices, key=lambda path: prices[path]):
            if degrees[path] == ORIGINAL and prices[path] <= left:
                degrees[path] = degree
                left -= prices[path]
    return degrees


def next_allowance(tried: Sequence[tuple[float, float]], budget: float) -> float:
    """The sum of costs to try next, so that what is lost comes to a little less than the budget.

    Log loss against log sum is taken as a line: of slope 1 through the one try, later through the two nearest to the
    budget; and the answer stays between the largest sum that was within the budget and the smallest that was not.

    Args:
        tried: (sum of costs, nats lost), at least one; what is not above zero counts as next to none.
    """
    points = [(max(cost, 1e-6 * budget), min(max(lost, 1e-3 * budget), 1e6 * budget)) for cost, lost in tried]
    aim = AIM * budget
    points.sort(key=lambda point: abs(math.log(point[1] / aim)))
    (cost, lost), slope = points[0], 1.0
    if len(points) > 1 and points[1][0] != cost:
        slope = math.log(points[1][1] / lost) / math.log(points[1][0] / cost)
        slope = min(max(slope, STEEPNESS[0]), STEEPNESS[1])
    allowance: float = cost * (aim / lost) ** (1 / slope)
    within = max((cost for cost, lost in points if lost <= budget), default=0.0)
    beyond = min((cost for cost, lost in points if lost > budget), default=math.inf)
    if within < beyond < math.inf and not within < allowance < beyond:
        return math.sqrt(within * beyond) if within else beyond / 2
    return allowance


def convert_within(
    task: ConversionTask,
    form: str,
    allowed: float,
    nats: Nats,
    divergence: Divergence,
    check: Batches,
    workshop: PartialRun,
) -> tuple[Replacements, Budget, str]:
    """Converts within `allowed` nats.

    Args:
        form: that a twin takes all of whose blocks are quadratic; any other is custom.
        nats: mean loss of a model on batches.
        divergence: see :data:`Divergence`.
        check: batches that the whole is measured on; the tokens that costs are measured on where empty.
        workshop: where costs and tries of an interrupted run are kept.
    Returns:
        what was replaced, the account, and the twin's form.
    Raises:
        ModelError: not even one block fits into the budget.
    """
    tokens = _held_out(task)
    costs = _known_costs(task, divergence, tokens, workshop)
    check = check or tokens
    before, originals = nats(task.model, check), task.originals()
    tried: list[tuple[int, int, float, float]] = []
    best: dict[str, int] = {}
    now, standing, done = degrees_within(costs, allowed), {}, Replacements([], [])
    losses: list[float] = processes.from_first(workshop.noted("losses")) or []  # of the tries of an interrupted run
    seen: list[dict[str, int]] = []
    while any(now.values()) and now not in seen and len(seen) < TRIES:
        if len(seen) == len(losses):
            put_back(task.model, originals)
            done, standing = _converted(task, form, now), now
            losses.append(nats(task.model, check) - before)
            if processes.first():
                workshop.note("losses", losses)
        lost = losses[len(seen)] if math.isfinite(losses[len(seen)]) else math.inf  # a twin that broke down
        seen.append(now)
        count = list(now.values())
        tried.append((count.count(2), count.count(3), _sum(costs, now), lost))
        fits = lost <= allowed
        best = now if fits and _better(now, best) else best
        if fits and (lost >= ENOUGH * allowed or set(count) == {2}):
            break
        now = degrees_within(costs, next_allowance([attempt[2:] for attempt in tried], allowed))
    if not best:
        put_back(task.model, originals)
        cheapest = min(min(cost.divergence.values()) for cost in costs)
        raise ModelError(
            f"no choice of blocks stays within {allowed} nats",
            cause=f"the cheapest single block is {cheapest:.4f} nats from the original",
            fix="give a larger --budget, or more calibration tokens",
        )
    if standing != best:
        put_back(task.model, originals)
        done = _converted(task, form, best)
    lost = losses[seen.index(best)]
    account = Budget(allowed, costs, best, _sum(costs, best), lost, tuple(tried), _count(tokens))
    return done, account, _form(form, best)


def measured_costs(task: ConversionTask, divergence: Divergence, tokens: Batches) -> tuple[BlockCost, ...]:
    """Each block alone, fitted on the original's stream, at every degree; the model is unchanged afterwards."""
    model = task.model
    like = task.like()
    apart = divergence(model, tokens)
    costs = []
    with (
        Passes(model, task.batches(), task.blocks, False, task.first_is_sink) as stream,
        Progress(len(task.blocks), task.quiet or not processes.first(), "costs") as progress,
    ):
        for station in stream:
            block = station.block
            originals = {path: attribute(model, path).original for path in block.replaced_paths}
            found = {}
            for degree in DEGREES:
                fitted = fit(station, task.settings(degree, "custom"), task.given.get(block.path))
                stream.replace(modules_for(fitted, "custom", like)[1])
                found[degree] = apart(model)
            stream.replace(originals)
            costs.append(BlockCost(block.path, found))
            progress.tell(f"{block.path} {found[2]:.4f} nats at degree 2, {found[3]:.4f} at 3")
    return tuple(costs)


def _known_costs(
    task: ConversionTask, divergence: Divergence, tokens: Batches, workshop: PartialRun
) -> tuple[BlockCost, ...]:
    """Those of an interrupted run, or measured and kept."""
    known = processes.from_first(workshop.noted("costs"))
    if known is not None:
        return tuple(BlockCost(path, {int(degree): cost for degree, cost in by.items()}) for path, by in known)
    costs = measured_costs(task, divergence, tokens)
    if processes.first():
        workshop.note("costs", [[cost.path, cost.divergence] for cost in costs])
    return costs


def _sum(costs: Sequence[BlockCost], degrees: Mapping[str, int]) -> float:
    return sum(cost.divergence[degrees[cost.path]] for cost in costs if degrees[cost.path])


def _converted(task: ConversionTask, form: str, degrees: Mapping[str, int]) -> Replacements:
    blocks = tuple(block for block in task.blocks if degrees[block.path])
    return replace_blocks(replace(task, blocks=blocks), _form(form, degrees), PartialRun(None), degrees)


def _form(quadratic: str, degrees: Mapping[str, int]) -> str:
    return quadratic if set(degrees.values()) == {2} else "custom"


def _better(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    def rank(degrees: Mapping[str, int]) -> tuple[int, int]:
        return sum(d == 2 for d in degrees.values()), sum(d == 3 for d in degrees.values())

    return rank(one) > rank(other)


def _held_out(task: ConversionTask) -> list[dict[str, Tensor]]:
    """Calibration sequences that no fit sees (they choose ridges): long ones, about COST_TOKENS tokens."""
    batches, found, count = task.data.batches, [], 0
    length = max(batch["input_ids"].shape[1] for batch in batches)
    for batch, fitted in zip(batches, fitted_sequences(batches), strict=True):
        rows = -(-(COST_TOKENS - count) // length)
        held = {name: value[fitted:][:rows] for name, value in batch.items()}
        if held["input_ids"].shape[1] == length and len(held["input_ids"]) and count < COST_TOKENS:
            found.append(held)
            count += held["input_ids"].numel()
    return found


def _count(batches: Batches) -> int:
    return sum(batch["input_ids"][:, 1:].numel() for batch in batches)
