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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from surgery.blocks.parts import attribute
from surgery.calibration.held_out import fitted_sequences
from surgery.calibration.passes import Passes
from surgery.conversion.measures import divergence, nats
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
    budget; and the result stays between the largest sum that was within the budget and the smallest that was not.

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
    task: ConversionTask, form: str, allowed: float, partial: PartialRun
) -> tuple[Replacements, Budget, str]:
    """Converts within `allowed` nats, measured on text that no fit sees (where there is none, on what costs are).

    Args:
        form: that a twin takes all of whose blocks are quadratic; any other is custom.
        partial: where costs and tries of an interrupted run are kept.
    Returns:
        what was replaced, the account, and the twin's form.
    Raises:
        ModelError: not even one block fits into the budget.
    """
    tokens = _held_out(task)
    costs = _known_costs(task, tokens, partial)
    search = _Search(task, form, allowed, costs, task.data.unseen or tokens, partial)
    best = search.best()
    if not best:
        put_back(task.model, search.originals)
        cheapest = min(min(cost.divergence.values()) for cost in costs)
        raise ModelError(
            f"no choice of blocks stays within {allowed} nats",
            cause=f"the cheapest single block is {cheapest:.4f} nats from the original",
            fix="give a larger --budget, or more calibration tokens",
        )
    done = search.converted(best)
    tried = tuple((list(now.values()).count(2), list(now.values()).count(3), *point) for now, point in search.tried)
    measured = next(lost for now, (_, lost) in search.tried if now == best)
    account = Budget(allowed, costs, best, _sum(costs, best), measured, tried, _count(tokens))
    return done, account, _form(form, best)


class _Search:
    """Choices of degrees tried one after another, each from what those before it lost.

    Attributes:
        tried: (degrees by path, (sum of costs, nats lost)) of each.
    """

    def __init__(
        self, task: ConversionTask, form: str, allowed: float, costs: Sequence[BlockCost], check: Batches,
        partial: PartialRun,
    ) -> None:  # fmt: skip
        self.task, self.form, self.allowed, self.costs = task, form, allowed, costs
        self.check, self.partial = check, partial
        self.before, self.originals = nats(task.model, check), task.originals()
        self.losses: list[float] = processes.from_first(partial.noted("losses")) or []  # of an interrupted run's tries
        self.tried: list[tuple[dict[str, int], tuple[float, float]]] = []
        self._standing: dict[str, int] = {}
        self._done = Replacements([], [])

    def converted(self, degrees: dict[str, int]) -> Replacements:
        """The model with these degrees, and none others."""
        if degrees != self._standing:
            put_back(self.task.model, self.originals)
            self._done, self._standing = _converted(self.task, self.form, degrees), degrees
        return self._done

    def lost(self, degrees: dict[str, int]) -> float:
        """Nats that the next try loses."""
        number = len(self.tried)
        if number == len(self.losses):
            self.converted(degrees)
            self.losses.append(nats(self.task.model, self.check) - self.before)
            if processes.first():
                self.partial.note("losses", self.losses)
        return self.losses[number] if math.isfinite(self.losses[number]) else math.inf  # a twin that broke down

    def best(self) -> dict[str, int]:
        """The best choice that stays within the allowance; empty where none does."""
        best: dict[str, int] = {}
        now = degrees_within(self.costs, self.allowed)
        while any(now.values()) and now not in [degrees for degrees, _ in self.tried] and len(self.tried) < TRIES:
            lost = self.lost(now)
            self.tried.append((now, (_sum(self.costs, now), lost)))
            fits = lost <= self.allowed
            best = now if fits and _better(now, best) else best
            if fits and (lost >= ENOUGH * self.allowed or set(now.values()) == {2}):
                break
            now = degrees_within(self.costs, next_allowance([point for _, point in self.tried], self.allowed))
        return best


def measured_costs(task: ConversionTask, tokens: Batches) -> tuple[BlockCost, ...]:
    """Each block alone, fitted on the original's stream, at every degree; the model is unchanged afterwards."""
    model = task.model
    like = task.like()
    apart = divergence(model, tokens)
    costs = []
    with (
        Passes(model, task.batches(), task.blocks, False, task.first_is_sink, matmul=task.plan.matmul) as passes,
        Progress(len(task.blocks), task.quiet or not processes.first(), "costs") as progress,
    ):
        for station in passes:
            block = station.block
            originals = {path: attribute(model, path).original for path in block.replaced_paths}
            found = {}
            for degree in DEGREES:
                fitted = fit(station, task.settings(degree, "custom"), task.given.get(block.path))
                passes.replace(modules_for(fitted, "custom", like)[1])
                found[degree] = apart(model)
            passes.replace(originals)
            costs.append(BlockCost(block.path, found))
            progress.tell(f"{block.path} {found[2]:.4f} nats at degree 2, {found[3]:.4f} at 3")
    return tuple(costs)


def _known_costs(task: ConversionTask, tokens: Batches, partial: PartialRun) -> tuple[BlockCost, ...]:
    """Those of an interrupted run, or measured and kept."""
    known = processes.from_first(partial.noted("costs"))
    if known is not None:
        return tuple(BlockCost(path, {int(degree): cost for degree, cost in by.items()}) for path, by in known)
    costs = measured_costs(task, tokens)
    if processes.first():
        partial.note("costs", [[cost.path, cost.divergence] for cost in costs])
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
