"""How long the stages of a run may take here, and how much room they need: a rough guess, from one matrix product."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evals.settings import evaluation_settings
from surgery.calibration.mixtures import Mixture
from surgery.calibration.texts import AUTO, SAMPLES
from surgery.conversion.recipe import Recipe
from surgery.models import loading
from surgery.runs.recipe import RunRecipe
from surgery.runs.stages import Stage
from surgery.runtime.precision import fast_bf16

SIDE, MOMENT = 1024, 0.2  # of the matrices, and seconds to multiply them for
REACHED = 0.6  # of that speed, by a model
PASSES = 2.3  # forward passes that a conversion in closed form takes, measured (docs/results.md)
DESCENT = 0.65  # forward passes that an epoch of descent adds, its share of the second readout included
TRAINING = 4  # forward passes of a training step: the teacher's, the student's, and its backward pass at two
DRAWING = 4  # forward passes that drawing a token takes
SETTING_UP = 8.0  # seconds of each stage: loading, and the check in a fresh process
SPEED = 30.0  # seconds that measuring the speed takes


def machine_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second, of one matrix product."""
    one = torch.randn(SIDE, SIDE, device=device).to(dtype)
    one @ one
    begun, count = time.monotonic(), 0
    while time.monotonic() - begun < MOMENT:
        float((one @ one)[0, 0])  # waits for the device
        count += 1
    return count * 2 * SIDE**3 / (time.monotonic() - begun)


class Estimate:
    """Seconds and bytes of a run's stages.

    Attributes:
        parameters: of the model.
        bytes: of a twin on disk.
        memory: of the model and the passes in memory, at least.
    """

    def __init__(self, recipe: RunRecipe) -> None:
        model, *_ = loading.load_meta(recipe.model, recipe.revision)
        config: Any = getattr(model, "config", None)
        self.parameters = sum(value.numel() for value in model.parameters())
        first = recipe.conversions[0]
        stored = loading.stored_dtype(Path(recipe.model), config) if first.save_dtype == "auto" else first.save_dtype
        self.bytes = self.parameters * getattr(torch, stored).itemsize
        width = getattr(config.get_text_config(), "hidden_size", 0) or 0
        self.memory = 4 * self.parameters + 8 * first.tokens * width
        device = loading.placed(recipe.device)
        self.slow = machine_speed(device, torch.float32) * REACHED
        fast = torch.bfloat16 if fast_bf16(device) else torch.float32
        self.fast = machine_speed(device, fast) * REACHED

    def seconds(self, stage: Stage, recipe: RunRecipe) -> float | None:
        """None for what depends on a network or on tasks."""
        if stage.kind == "convert":
            return SETTING_UP + self._conversion(
                next(plan for plan in recipe.conversions if plan.output == str(stage.twin))
            )
        if stage.kind == "refine":
            settings = recipe.refinement()
            looks = settings.tokens / (settings.window * settings.batch * settings.accumulate) / settings.validate_every
            return (
                SETTING_UP
                + (TRAINING * settings.tokens + looks * settings.validate_tokens) * self._forward() / self.fast
            )
        if stage.kind == "eval":
            settings_of = evaluation_settings(stage.twin, **({"skip": 0} | recipe.evaluation(stage.twin)))
            tokens = settings_of.tokens + len(settings_of.kind) * settings_of.kind_tokens + 2 * settings_of.block_tokens
            known = 2 * tokens * self._forward() / self.slow + SPEED * settings_of.speed
            return None if settings_of.tasks else SETTING_UP + known
        return 1.0 if stage.kind == "card" else None

    def _forward(self) -> float:
        """Operations a token."""
        return 2.0 * self.parameters

    def _conversion(self, plan: Recipe) -> float:
        drawn = sum(part.share for part in Mixture.of(plan.text).parts if part.source in (SAMPLES, AUTO))
        fitted = PASSES + DESCENT * plan.epochs_at(plan.degree)
        passes = fitted * (1 if plan.budget is None else 4) + DRAWING * drawn
        return (passes * plan.tokens + 2 * plan.measure) * self._forward() / self.slow


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
