"""A fitted block as modules, described as a checkpoint needs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from surgery.fitting.block import FittedBlock
from surgery.fitting.experts import FittedExperts
from surgery.models.saved_blocks import saved_block


def modules_for(
    fitted: FittedBlock | FittedExperts, form: str, like: Tensor
) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """The entry of `polynomial_blocks` for a block, and its modules with their weights, by path.

    Args:
        form: of the twin: native, whose blocks are bilinear, or custom.
        like: a tensor of the modules' dtype and device.
    """
    entry = fitted.block.saved_entry(fitted.polynomials, form)
    return entry, saved_block(entry).built(fitted.polynomials, like)
