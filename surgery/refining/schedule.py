"""How long a refinement takes, and how fast it goes at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from surgery.refining.settings import RefineSettings


@dataclass(frozen=True)
class Schedule:
    """The settings, and the optimiser steps that they come to."""

    settings: RefineSettings
    steps: int

    @staticmethod
    def of(settings: RefineSettings, processes: int) -> Schedule:
        """For so many processes, which share a step's windows."""
        a_step = settings.batch * settings.accumulate * processes * settings.window
        return Schedule(settings, max(1, settings.tokens // a_step))

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        warm = max(1, round(self.settings.warmup * self.steps))
        done = (step - warm) / max(1, self.steps - warm)
        share: float = (step + 1) / warm if done < 0 else 0.1 + 0.45 * (1 + math.cos(math.pi * done))
        return self.settings.rate * share

    def decay_at(self, step: int) -> float:
        """Short memory at first, so that the start does not stay in the mean."""
        return min(self.settings.average, (1 + step) / (10 + step))
