"""Blocks that run several times in one forward pass: one set of weights for many layers (ALBERT) or cycles (HRM).

No pass can wait at such a block, since what its second call receives hangs on what the first one wrote. So they come
last: what each call receives in the twin as it is by then is collected, and the block is fitted on all of it. Where the
original's calls were collected too, before anything was replaced, each call makes up for what came before it; and since
what it receives hangs on the block itself, inputs are collected and fitted on again with the polynomial in its place.

Memory: the inputs of all calls, in both; up to four more forward passes over the calibration text for each such block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.blocks.block import Block
from surgery.blocks.parts import norms_around
from surgery.blocks.residual import NORM
from surgery.calibration.arrivals import Arrival, Station, kept_rows
from surgery.calibration.passes import Passes
from surgery.runtime.hooks import hooked


def split_repeated(blocks: Sequence[Block]) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """Blocks that run once in a forward pass, and those that run several times."""
    return tuple(b for b in blocks if b.calls == 1), tuple(b for b in blocks if b.calls > 1)


@dataclass(frozen=True)
class _Call:
    """What one call of a block receives, (…, d), and the stream that its output joins, where it is known how."""

    x: Tensor
    residual: Tensor | None


def repeated_arrivals(block: Block, passes: Passes) -> tuple[Arrival, ...]:
    """All that the block receives in the model as it is now; one arrival per batch and call."""
    return tuple(
        _arrival(block, call, batch, fitted)
        for batch, fitted in zip(passes.batches, passes.fitted, strict=False)  # of all batches, from this process's on
        for call in _calls(passes.model, block, batch)
    )


def repeated_station(block: Block, passes: Passes, original: tuple[Arrival, ...]) -> Station:
    """The block with all its calls in the twin as it is now, and those of the original, where they were collected."""
    arrivals = repeated_arrivals(block, passes)
    return Station(block, block.modules(passes.model), arrivals, original, passes.number * block.calls)


def _calls(model: Any, block: Block, batch: Mapping[str, Tensor]) -> list[_Call]:
    found: list[_Call] = []
    normed: list[tuple[Tensor, Tensor]] = []
    residual = block.residual

    def arrive(_: nn.Module, args: tuple[Any, ...]) -> None:
        x, base = args[0], args[0]
        if residual is not None and residual.base == NORM:
            base = next((before for before, after in normed if after.data_ptr() == x.data_ptr()), None)
        normed.clear()
        found.append(_Call(x, None if residual is None else base))

    handles = [model.get_submodule(block.entry).register_forward_pre_hook(arrive)]
    for norm in norms_around(model, block.path).values():
        handles.append(norm.register_forward_hook(lambda _, args, output: normed.append((args[0], output))))
    with torch.no_grad(), hooked(handles):
        model(**batch)
    return found


def _arrival(block: Block, call: _Call, batch: Mapping[str, Tensor], fitted: int) -> Arrival:
    flat = call.x.flatten(0, -2)
    residual = None if call.residual is None else call.residual.flatten(0, -2)
    each = max(1, len(flat) // len(next(iter(batch.values()))))
    held = torch.arange(len(flat), device=flat.device) >= fitted * each
    size = (flat if residual is None else residual).norm(dim=-1).float()
    keep = kept_rows(block, batch, flat)
    return Arrival(flat, keep, residual, size, held, torch.zeros_like(keep))
