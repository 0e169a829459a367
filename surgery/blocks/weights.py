"""A block's weights and what it computes, whatever modules hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.closed_form.activations import Activation

Map = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias."""


@dataclass(frozen=True)
class BlockWeights:
    """f(x) = down(σ(gate x)), or down(σ(gate x) ⊙ up x); `up` is None in a plain block."""

    activation: Activation
    gate: Map
    up: Map | None
    down: Map

    def on_cpu(self) -> BlockWeights:
        """The same, in the machine's own memory."""
        gate, up, down = (
            None if one is None else (one[0].cpu(), None if one[1] is None else one[1].cpu())
            for one in (self.gate, self.up, self.down)
        )
        assert gate is not None and down is not None
        return BlockWeights(self.activation, gate, up, down)

    def finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        maps = (self.gate, self.down) if self.up is None else (self.gate, self.up, self.down)
        return all(bool(torch.isfinite(part).all()) for one in maps for part in one if part is not None)

    def preactivations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """y and z for inputs of shape (…, d); (…, h) each."""
        y = nn.functional.linear(x, *self.gate)
        return y, None if self.up is None else nn.functional.linear(x, *self.up)

    def hidden(self, y: Tensor, z: Tensor | None) -> Tensor:
        """The units' values, (…, h)."""
        return self.activation.unit(y, z)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.hidden(*self.preactivations(x)), *self.down)
