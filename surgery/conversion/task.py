"""What is to be replaced, what has been, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.blocks.block import Block
from surgery.blocks.parts import attribute
from surgery.calibration.inputs import Calibration
from surgery.closed_form import sinks
from surgery.closed_form.moments import GaussianMixture
from surgery.conversion.recipe import Recipe
from surgery.fitting.block import FitSettings
from surgery.models.modeling_polynomial import install
from surgery.runtime import weights_on_disk
from surgery.saving.forms import set_config


@dataclass(frozen=True)
class ConversionTask:
    """What is to be replaced, with everything a fit needs.

    Attributes:
        blocks: in the order in which they run, verified.
        given: distributions of the blocks' inputs by path, for `assume: gaussian`.
        first_token: how massive the first token of a sequence becomes, see
            :func:`surgery.calibration.arrivals.first_token_size`.
    """

    model: Any
    blocks: tuple[Block, ...]
    data: Calibration
    plan: Recipe
    given: Mapping[str, GaussianMixture]
    first_token: float
    quiet: bool

    @property
    def first_is_sink(self) -> bool:
        """The first token of a sequence turns into an attention sink."""
        return self.first_token > sinks.MASSIVE

    def settings(self, degree: int, form: str) -> FitSettings:
        plan = self.plan
        return FitSettings(
            degree=degree,
            assume="data" if plan.assume == "data" else "gaussian",
            refit=plan.refit,
            tail_weight=plan.tail,
            tail_width=plan.tail_width,
            guard=degree == 2 and (form == "native" or plan.epochs_at(degree) > 0),
            units=plan.units,
            epochs=plan.epochs_at(degree),
            sink_limit=sinks.limit_of(self.first_token),
            matmul=plan.matmul,
        )

    def batches(self) -> list[dict[str, Any]]:
        """The calibration inputs where the model is, as its forward passes take them."""
        cache = {"use_cache": False} if self.model.can_generate() else {}
        device = weights_on_disk.device_of(self.model)
        return [{**{name: value.to(device) for name, value in batch.items()}, **cache} for batch in self.data.batches]

    def like(self) -> Tensor:
        """A tensor of the precision and in the place of the model's computations."""
        return torch.empty(0, dtype=next(self.model.parameters()).dtype, device=weights_on_disk.device_of(self.model))

    def originals(self) -> dict[str, Any]:
        return {path: attribute(self.model, path) for block in self.blocks for path in block.replaced_paths}


@dataclass(frozen=True)
class Replacements:
    """Per block: its entry in `polynomial_blocks`, and its row in the report; and what the twin makes of the probe."""

    entries: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    outcome: Any = None


def put_back(model: Any, originals: Mapping[str, Any]) -> None:
    """The originals into their places again, by path."""
    for path, module in originals.items():
        install(model, path, module)


@contextmanager
def unchanged_on_error(task: ConversionTask) -> Iterator[None]:
    """On any error inside, the model is as it was before: its blocks, its configuration and its class."""
    model = task.model
    originals, kind, config, settings = task.originals(), type(model), model.config, dict(vars(model.config))
    try:
        yield
    except BaseException:
        put_back(model, originals)
        model.__class__ = kind
        set_config(model, config)
        vars(config).clear()
        vars(config).update(settings)
        raise
