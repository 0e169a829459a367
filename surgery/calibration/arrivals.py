"""What a forward pass brings to a block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.blocks.block import Block
from surgery.blocks.experts import Routing
from surgery.blocks.parts import layer_of
from surgery.errors import CalibrationError
from surgery.runtime.hooks import hooked


@dataclass(frozen=True)
class Arrival:
    """What one forward pass brings to a block; flat over (sequence, position), padding included.

    Attributes:
        x: the block's input, (tokens, d).
        keep: which rows are real tokens, bool.
        residual: the residual stream that the block's output will be added to, (tokens, d), where it is known (see
            :class:`surgery.blocks.residual.Residual`).
        size: norm of the residual stream (or, where unknown, of the layer's input), (tokens,).
        held: rows of held-out sequences, which choose the ridge instead of fitting; the last ones of a batch.
        known_sink: rows known beforehand to be attention sinks (see :func:`first_token_size`), bool.
        routing: which experts the rows go to, where the block is a mixture.
        weight: how much the block's output counts in each row, (tokens,); None where it counts fully.
    """

    x: Tensor
    keep: Tensor
    residual: Tensor | None
    size: Tensor
    held: Tensor
    known_sink: Tensor
    routing: Routing | None = None
    weight: Tensor | None = None

    def at(self, rows: Tensor, weight: Tensor | None = None) -> Arrival:
        """Some of the rows, of which those that are held out stay last, without what the block's layer knows of them.

        Args:
            weight: how much the block's output counts in each of them.
        """
        parts = {name: getattr(self, name)[rows] for name in ("x", "keep", "size", "held", "known_sink")}
        return Arrival(**parts, residual=None, weight=weight)


@dataclass(frozen=True)
class Station:
    """A block, with all passes waiting at its entrance."""

    block: Block
    modules: Mapping[str, Any]  # the original's modules, by path: its maps and its activation
    twin: tuple[Arrival, ...]
    original: tuple[Arrival, ...]  # empty unless the original stream runs too
    number: int = 0  # of the first pass, among those of all processes


def kept_rows(block: Block, batch: Mapping[str, Tensor], flat: Tensor) -> Tensor:
    """Which rows of a block's input are real tokens, bool. Raises CalibrationError where a mask does not say."""
    names = ["attention_mask", "decoder_attention_mask"]
    if "decoder" in block.path.split("."):
        names.reverse()
    masks = [batch[name] for name in names if name in batch]
    for mask in masks:
        if mask.numel() == len(flat):
            return mask.flatten().bool().to(flat.device)
    if any(not bool(mask.bool().all()) for mask in masks):
        raise CalibrationError(
            f"the inputs are padded, but the block sees {len(flat)} positions, which no mask fits",
            where=block.path,
            fix="give calibration inputs without padding",
        )
    return torch.ones(len(flat), dtype=torch.bool, device=flat.device)


def first_token_size(model: nn.Module, batch: Mapping[str, Tensor], blocks: Sequence[Block]) -> float:
    """How massive the first token of a sequence becomes: the norm of its residual stream over the other tokens'.

    The median of each, in one forward pass, after the layer where the ratio is largest; 0 where there is no such layer.
    From `sinks.MASSIVE` on the first token is an attention sink. Before that layer it has an ordinary norm, but it is
    on its way, and errors there decide what the sink will be.
    """
    found = [0.0]

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[1] > 1:
            norms = hidden.float().norm(dim=-1)
            mask = batch.get("attention_mask")
            real = torch.ones_like(norms, dtype=torch.bool)
            if mask is not None and mask.shape == norms.shape:
                real = mask.bool().to(norms.device)
            first = real & (real.long().cumsum(-1) == 1)
            if bool(first.any()) and bool((real & ~first).any()):
                found.append(float(norms[first].median() / norms[real & ~first].median().clamp_min(1e-30)))

    layers = {layer_of(block.path) for block in blocks}
    with torch.no_grad(), hooked(model.get_submodule(path).register_forward_hook(hook) for path in layers):
        model(**batch)
    return max(size for size in found if not math.isnan(size))
