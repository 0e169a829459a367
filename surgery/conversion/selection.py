"""Which blocks a recipe asks for, in which form, and what forbids it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from surgery.blocks.block import Block
from surgery.blocks.find import Survey
from surgery.blocks.parts import attribute
from surgery.calibration.mixtures import Mixture
from surgery.calibration.repeated import split_repeated
from surgery.conversion.recipe import Recipe, parse_blocks
from surgery.errors import ModelError, RecipeError


def check_conversion(recipe: Recipe) -> None:
    """Raises SurgeryError for what can be wrong in a recipe by itself: no model, or no such calibration source."""
    check_named(recipe)
    Mixture.of(recipe.text).check()


def check_named(recipe: Recipe) -> None:
    """Raises RecipeError where the recipe names no model."""
    if not recipe.model:
        raise RecipeError("no model was named", fix="surgery convert MODEL -o OUT, or name it in the recipe")


def chosen_blocks(found: Survey, recipe: Recipe) -> tuple[Block, ...]:
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
    """The checkpoint form a recipe comes to. Raises RecipeError where it asks for the native one in vain."""
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
        for path in {*block.replaced_paths, *block.first, block.last}:
            part = attribute(model, path)
            if isinstance(part, nn.Module) and (part._forward_hooks or part._forward_pre_hooks):
                raise ModelError(
                    "a part of a block to be replaced has a forward hook",
                    where=path,
                    cause="the hook may change what the block computes, and would be lost",
                    fix="remove it, and put it on the twin",
                )


def check_repeated(blocks: Sequence[Block], recipe: Recipe) -> None:
    """Raises ModelError where the recipe asks of blocks that several layers share what they do not allow."""
    _, repeated = split_repeated(blocks)
    if repeated and (recipe.offload or recipe.budget is not None):
        raise ModelError(
            "several layers share this block, so that it cannot "
            + ("stay on disk" if recipe.offload else "be weighed by itself"),
            where=repeated[0].path,
            cause=f"it runs {repeated[0].calls} times in one forward pass",
            fix=f"leave --{'offload' if recipe.offload else 'budget'} out, or this block with --blocks",
        )
