"""A block's weights and what it computes, whatever modules hold them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from surgery.closed_form.activations import Activation
from surgery.runtime.precision import multiplied_in

Map = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias."""


@dataclass(frozen=True)
class BlockWeights:
    """f(x) = down(σ(gate x)), or down(σ(gate x) ⊙ up x); `up` is None in a plain block.

    Attributes:
        matmul: what a float32 input is multiplied in: preactivations and outputs are rounded to it and come back as
            float32, and on the way from one to the other hidden vectors stay in it.
    """

    activation: Activation
    gate: Map
    up: Map | None
    down: Map
    matmul: str = "float32"

    def on_cpu(self) -> BlockWeights:
        """The same, in the machine's own memory."""
        gate, up, down = (
            None if one is None else (one[0].cpu(), None if one[1] is None else one[1].cpu())
            for one in (self.gate, self.up, self.down)
        )
        assert gate is not None and down is not None
        return replace(self, gate=gate, up=up, down=down)

    def finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        maps = (self.gate, self.down) if self.up is None else (self.gate, self.up, self.down)
        return all(bool(torch.isfinite(part).all()) for one in maps for part in one if part is not None)

    def preactivations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """y and z for inputs of shape (…, d); (…, h) each."""
        y, z = self._first(x)
        return y.to(x.dtype), None if z is None else z.to(x.dtype)

    def _first(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        with multiplied_in(self.matmul, x):
            y = nn.functional.linear(x, *self.gate)
            return y, None if self.up is None else nn.functional.linear(x, *self.up)

    def hidden(self, y: Tensor, z: Tensor | None) -> Tensor:
        """The units' values, (…, h)."""
        return self.activation.unit(y, z)

    def __call__(self, x: Tensor) -> Tensor:
        hidden = self.hidden(*self._first(x))
        with multiplied_in(self.matmul, x):
            return nn.functional.linear(hidden, *self.down).to(x.dtype)
