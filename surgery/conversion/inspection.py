"""What a model contains and what a conversion would do with it; no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.blocks.block import Block
from surgery.blocks.find import Survey, survey
from surgery.conversion.cost import ConversionCost
from surgery.conversion.recipe import Recipe
from surgery.conversion.selection import check_conversion, chosen_blocks, form_of
from surgery.models import loading
from surgery.models.as_llama import llama_config
from surgery.runtime.speed import Speed
from surgery.saving.folder import check_target
from surgery.saving.forms import native_config


@dataclass(frozen=True)
class Inspection:
    """What `surgery inspect` shows."""

    name: str
    architecture: str
    survey: Survey
    native: bool
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "architecture": self.architecture,
            **({"note": self.note} if self.note else {}),
            "blocks": [{**block.as_dict(), "forms": self.forms(block)} for block in self.survey.blocks],
            "left_alone": [{"path": path, "reason": reason} for path, reason in self.survey.left_alone],
        }

    def forms(self, block: Block) -> list[str]:
        """Checkpoint forms a twin of degree 2 can take with this block converted."""
        return (["native"] if self.native and block.takes_native_form else []) + ["custom"]


def inspect(model: str | Path, *, revision: str | None = None) -> Inspection:
    """Finds the feed-forward blocks of a model from its configuration alone; no weights are read.

    Args:
        model: Hub id, folder or .gguf file; `revision` of the Hub.
    Returns:
        every block with its kind, widths and possible forms, and what was left alone, with the reason.
    Raises:
        ModelError: nothing there, or not a transformers model.
    """
    name = str(model)
    network, config, note = loading.load_meta(name, revision)
    found = survey(network)
    hidden = found.blocks[0].hidden if found.blocks else 0
    stored = loading.stored_dtype(Path(name), config)
    native = native_config(network, found.blocks, hidden + 1) is not None or llama_config(network, stored) is not None
    return Inspection(name, type(network).__name__, found, native and not found.left_alone, note)


def plan_conversion(recipe: Recipe, overwrite: bool = False) -> dict[str, Any]:
    """What a conversion would do: `--dry-run`. Loads no weights. Raises SurgeryError for what it would refuse."""
    check_conversion(recipe)
    place = loading.placed(recipe.device)
    if recipe.output:
        check_target(Path(recipe.output), overwrite)
    seen = inspect(recipe.model, revision=recipe.revision)
    blocks = chosen_blocks(seen.survey, recipe)
    cost = ConversionCost.of(loading.load_meta(recipe.model, recipe.revision)[0], blocks, recipe)
    form = form_of(recipe, seen.native and len(blocks) == len(seen.survey.blocks))
    return {
        **seen.as_dict(),
        "recipe": recipe.resolved(),
        "convert": [block.path for block in blocks],
        "form": form,
        "coefficients_per_unit": blocks[0].coefficients(recipe.degree),
        "cost": {
            "seconds": cost.seconds(Speed.of(place, recipe.matmul)),
            "memory": cost.memory,
            "disk": cost.disk,
            "operations": {"products": cost.products, "exact": cost.exact, "double": cost.double},
        },
    }
