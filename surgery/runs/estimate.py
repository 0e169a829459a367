"""How long the stages of a run may take here, and how much room they need: a guess from one matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evals.settings import evaluation_settings
from surgery.blocks.find import survey
from surgery.calibration.mixtures import Mixture
from surgery.calibration.texts import SAMPLES
from surgery.conversion.cost import DRAWING, ConversionCost
from surgery.conversion.recipe import Recipe
from surgery.conversion.selection import chosen_blocks
from surgery.models import loading
from surgery.refining.kept_predictions import bytes_kept
from surgery.runs.recipe import RunRecipe
from surgery.runs.stages import Stage
from surgery.runtime.speed import Speed

TRAINING = 4  # forward passes of a training step: the teacher's, the student's, and its backward pass at two
SETTING_UP = 8.0  # seconds of each stage: loading, and the check in a fresh process
SPEED = 30.0  # seconds that measuring the speed takes


class Estimate:
    """Seconds and bytes of a run's stages.

    Attributes:
        parameters: of the model.
        bytes: of a twin on disk.
        kept: bytes of the original's predictions that a refinement keeps on disk, at most.
        memory: of the model and the passes in memory, at least.
    """

    def __init__(self, recipe: RunRecipe) -> None:
        model, *_ = loading.load_meta(recipe.model, recipe.revision)
        self.parameters = sum(value.numel() for value in model.parameters())
        first = recipe.conversions[0]
        self.costs = {plan.output: self._cost(model, plan) for plan in recipe.conversions}
        self.bytes = self.costs[first.output].disk
        refinement = recipe.refinement() if recipe.refine is not None else None
        self.kept = bytes_kept(refinement.tokens, refinement.teacher_top_k) if refinement else 0
        self.memory = max(cost.memory for cost in self.costs.values())
        self.device = loading.placed(recipe.device)
        self.speed = Speed.of(self.device, first.matmul)

    def seconds(self, stage: Stage, recipe: RunRecipe) -> float | None:
        """None for what depends on a network or on tasks."""
        if stage.kind == "convert":
            return SETTING_UP + self.costs[str(stage.twin)].seconds(self.speed)
        if stage.kind == "refine":
            settings = recipe.refinement()
            looks = settings.tokens / (settings.window * settings.batch * settings.accumulate) / settings.validate_every
            drawn = DRAWING * Mixture.of(settings.text).share(SAMPLES)
            passes = (TRAINING + drawn) * settings.tokens + looks * settings.validate_tokens
            if settings.control:  # an original, by the text itself
                passes += (TRAINING - 1 + drawn) * settings.tokens + looks * settings.validate_tokens
            return SETTING_UP + passes * self._forward() / Speed.of(self.device, settings.dtype).products
        if stage.kind == "eval":
            settings_of = evaluation_settings(stage.twin, **({"skip": 0} | recipe.evaluation(stage.twin)))
            tokens = settings_of.tokens + len(settings_of.kind) * settings_of.kind_tokens + 2 * settings_of.block_tokens
            known = 2 * tokens * self._forward() / self.speed.exact + SPEED * settings_of.speed
            return None if settings_of.tasks else SETTING_UP + known
        return 1.0 if stage.kind == "card" else None

    def _forward(self) -> float:
        """Operations a token."""
        return 2.0 * self.parameters

    @staticmethod
    def _cost(model: Any, plan: Recipe) -> ConversionCost:
        return ConversionCost.of(model, chosen_blocks(survey(model), plan), plan)


def spoken(seconds: float | None) -> str:
    """About 40 s, about 7 min, about 2.5 h."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"about {max(1, round(seconds, -1 if seconds > 20 else 0)):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def sized(count: float) -> str:
    """270 MB, 1.2 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:,.{0 if count >= 1e7 else 1}f} MB"


def as_rows(planned: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(stage, result, what would be done, time) of a plan."""
    return [
        (row["stage"], row["label"], row["why"] or "already done", "" if not row["why"] else spoken(row["seconds"]))
        for row in planned["stages"]
    ]
