"""Blocks that run several times in one forward pass: one set of weights for many layers (ALBERT) or cycles (HRM).

No pass can wait at such a block, since what its second call receives hangs on what the first one wrote. So they come
last: what each call receives in the twin as it is by then is collected, and the block is fitted on all of it, the
original's output of the same input its aim. Earlier replacements are not made up for.

Memory: the inputs of all calls; one more forward pass over the calibration text for each such block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.blocks.block import Block
from surgery.calibration.arrivals import Arrival, Station, kept_rows
from surgery.calibration.passes import Passes
from surgery.runtime.hooks import hooked


def split_repeated(blocks: Sequence[Block]) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """Blocks that run once in a forward pass, and those that run several times."""
    return tuple(b for b in blocks if b.calls == 1), tuple(b for b in blocks if b.calls > 1)


def repeated_station(block: Block, passes: Passes) -> Station:
    """All that the block receives in the twin as it is now; one arrival per batch and call."""
    arrivals = [
        _arrival(block, x, batch, fitted)
        for batch, fitted in zip(passes.batches, passes.fitted, strict=False)  # of all batches, from this process's on
        for x in _received(passes.model, block, batch)
    ]
    return Station(block, block.modules(passes.model), tuple(arrivals), (), passes.number * block.calls)


def _received(model: Any, block: Block, batch: Mapping[str, Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    handle = model.get_submodule(block.entry).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad(), hooked([handle]):
        model(**batch)
    return found


def _arrival(block: Block, x: Tensor, batch: Mapping[str, Tensor], fitted: int) -> Arrival:
    flat = x.flatten(0, -2)
    each = max(1, len(flat) // len(next(iter(batch.values()))))
    held = torch.arange(len(flat), device=flat.device) >= fitted * each
    keep = kept_rows(block, batch, flat)
    return Arrival(flat, keep, None, flat.norm(dim=-1).float(), held, torch.zeros_like(keep))
