"""What a model contains and what a conversion would do with it; no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgery import loading, shared, swap
from surgery.blocks import Block, Survey, attribute, survey
from surgery.errors import ModelError, RecipeError
from surgery.recipe import Recipe, parse_blocks
from surgery.reexpress import llama_config


@dataclass(frozen=True)
class Inspection:
    """What `surgery inspect` shows."""

    name: str
    architecture: str
    survey: Survey
    native: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "architecture": self.architecture,
            "blocks": [{**block.as_dict(), "forms": self.forms(block)} for block in self.survey.blocks],
            "left_alone": [{"path": path, "reason": reason} for path, reason in self.survey.left_alone],
        }

    def forms(self, block: Block) -> list[str]:
        """Checkpoint forms a twin of degree 2 can take with this block converted."""
        return (["native"] if self.native and block.kind == "gated" else []) + ["custom"]


def inspect(name: str, revision: str | None = None) -> Inspection:
    """Finds the blocks of a model from its configuration alone; no weights are read."""
    model, config = loading.load_meta(name, revision)
    found = survey(model)
    hidden = found.blocks[0].hidden if found.blocks else 0
    stored = loading.stored_dtype(Path(name), config)
    native = swap.native_config(model, found.blocks, hidden + 1) is not None or llama_config(model, stored) is not None
    return Inspection(name, type(model).__name__, found, native and not found.left_alone)


def plan(recipe: Recipe) -> dict[str, Any]:
    """What a conversion would do, without loading weights: `--dry-run`."""
    seen = inspect(recipe.model, recipe.revision)
    blocks = choose(seen.survey, recipe)
    form = form_of(recipe, seen.native and len(blocks) == len(seen.survey.blocks))
    unit = {"plain": recipe.degree + 1}.get(blocks[0].kind, 2 * recipe.degree + 1)
    return {
        **seen.as_dict(),
        "recipe": recipe.resolved(),
        "convert": [block.path for block in blocks],
        "form": form,
        "coefficients_per_unit": unit,
    }


def choose(found: Survey, recipe: Recipe) -> tuple[Block, ...]:
    """The blocks the recipe asks for. Raises ModelError where there are none, RecipeError for a wrong number."""
    if not found.blocks:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in found.left_alone[:3])
        raise ModelError(
            "no convertible feed-forward block was found" + (f" ({reasons})" if reasons else ""),
            where=recipe.model,
            cause="not a transformer, or an architecture whose blocks have another shape",
            fix="run `surgery inspect` to see what was looked at",
        )
    if recipe.blocks is None:
        return found.blocks
    wanted = parse_blocks(recipe.blocks)
    if wanted[-1] >= len(found.blocks):
        raise RecipeError(
            f"block {wanted[-1]} was asked for, but the model has blocks 0 to {len(found.blocks) - 1}",
            where="--blocks",
            fix="`surgery inspect` lists them",
        )
    return tuple(found.blocks[index] for index in wanted)


def form_of(recipe: Recipe, native_possible: bool) -> str:
    native = native_possible and recipe.degree == 2
    if recipe.form == "native" and not native:
        raise RecipeError(
            "the native form is not possible here",
            cause="it needs every block gated and converted at degree 2, in an architecture with mlp_bias",
            fix="use form: auto or custom",
        )
    return "native" if native and recipe.form != "custom" else "custom"


def check_hooks(model: Any, blocks: Sequence[Block]) -> None:
    """Raises ModelError where a hook hangs on what is to be replaced: it may change the block, and would be lost."""
    for block in blocks:
        for path in {*block.replaced, *block.first, block.last}:
            part = attribute(model, path)
            if isinstance(part, nn.Module) and (part._forward_hooks or part._forward_pre_hooks):
                raise ModelError(
                    "a forward hook hangs on a part of a block that is to be replaced",
                    where=path,
                    cause="the hook may change what the block computes, and would be lost",
                    fix="remove it, and put it on the twin",
                )


def check_repeated(blocks: Sequence[Block], recipe: Recipe) -> None:
    """Raises ModelError where the recipe asks of blocks that several layers share what they do not allow."""
    _, repeated = shared.split(blocks)
    if repeated and (recipe.offload or recipe.budget is not None):
        raise ModelError(
            "several layers share this block, so that it cannot "
            + ("stay on disk" if recipe.offload else "be weighed by itself"),
            where=repeated[0].path,
            cause=f"it runs {repeated[0].calls} times in one forward pass",
            fix=f"leave --{'offload' if recipe.offload else 'budget'} out, or this block with --blocks",
        )
