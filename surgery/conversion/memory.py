"""Whether the hidden states that wait at a block fit into memory; said before a sample is drawn or a block fitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.blocks.block import Block
from surgery.conversion.recipe import Recipe
from surgery.errors import CalibrationError
from surgery.runtime import processes

STATES = 2  # of a token, at the least: the block's input and the stream that its output joins
GIB = 2**30


def check_memory(blocks: Sequence[Block], plan: Recipe, like: torch.Tensor) -> None:
    """Raises CalibrationError where the recipe's tokens cannot wait in memory all together.

    What is counted is needed for certain; a fit takes more.

    Args:
        like: a tensor of the precision and in the place of the model's computations.
    """
    if plan.offload:  # they wait in files
        return
    # How a block joins the stream is seen when it has run once; before that, one set of passes is certain.
    streams = 2 if plan.refit and plan.target == "stream" and any(block.residual for block in blocks) else 1
    tokens = plan.tokens / processes.count()
    needed = tokens * max(block.width for block in blocks) * like.element_size() * STATES * streams
    free = free_memory(like.device)
    if needed > free:
        there = f"{needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
        raise CalibrationError(
            f"the hidden states of {plan.tokens:,} tokens take {there}",
            where="--tokens",
            cause="all calibration passes wait at a block until it is fitted",
            fix="fewer --tokens, --dtype bfloat16, several processes on several machines, or --offload, which keeps "
            "them in files",
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
