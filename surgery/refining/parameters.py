"""Which parameters of a twin are trained, by name, and which lie in its blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.blocks.find import survey
from surgery.errors import RecipeError, did_you_mean
from surgery.models.saved_blocks import saved_blocks

SETS = ("coefficients", "readout", "block", "all")
BlockPaths = list[tuple[tuple[str, ...], str]]  # see :func:`twin_block_paths`


def twin_block_paths(twin: Any) -> BlockPaths:
    """For every polynomial block: paths of its modules, and what the names of its last map begin with."""
    found = [(saved.paths, saved.readout) for saved in saved_blocks(twin)]
    return found or [((block.path,), f"{block.last}.") for block in survey(twin).blocks]


def names_inside(blocks: BlockPaths) -> tuple[str, ...]:
    """Beginnings of the names of what is in the replaced blocks, as :func:`twin_block_paths` gives them."""
    return tuple(f"{path}." for paths, _ in blocks for path in paths)


def named_trainable(twin: Any, which: str, blocks: BlockPaths | None = None) -> dict[str, nn.Parameter]:
    """The parameters to train, by name; all others are frozen.

    Args:
        blocks: as :func:`twin_block_paths` gives them, where `twin` is the original of the twin they are of.
    Raises:
        RecipeError: an unknown set, or one that this twin does not have.
    """
    if which not in SETS:
        raise RecipeError(f"no set of parameters {which!r}{did_you_mean(which, SETS)}", fix=f"one of {', '.join(SETS)}")
    blocks = twin_block_paths(twin) if blocks is None else blocks
    inside = names_inside(blocks)
    last = tuple(beginning for _, beginning in blocks)
    chosen = {}
    for name, parameter in twin.named_parameters():
        wanted = {
            "all": True,
            "block": name.startswith(inside),
            "readout": name.startswith(last),
            "coefficients": name.startswith(inside) and name.endswith("coefficients"),
        }[which]
        parameter.requires_grad_(wanted)
        if wanted:
            chosen[name] = parameter
    if not chosen:
        raise RecipeError(
            f"this twin has no {which} to train",
            cause="a native twin's coefficients are folded into its weights",
            fix="train the readout or the block",
        )
    return chosen
