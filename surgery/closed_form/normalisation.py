"""A norm that a block's output passes through, and how its output moves with its input.

    N(v) = γ ⊙ u(v) + β,   u(v) = v / rms(v)   or   (v − mean v) / std(v)

Whatever v is, u has the length √d: not every value of N can be had, and an error of v counts in proportion to 1/rms(v).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PULL = 0.01  # ε, of the median γ²


@dataclass(frozen=True)
class Normalisation:
    """N, without its ε.

    Attributes:
        scale, shift: γ and β, (d,).
        centred: whether the mean is taken off first (LayerNorm).
    """

    scale: Tensor
    shift: Tensor
    centred: bool

    @staticmethod
    def of(function: Callable[[Tensor], Tensor], like: Tensor) -> Normalisation | None:
        """Read off from what the function makes of a few values; None where it is not of this form.

        Args:
            like: (…, d) in the precision and the place of what it takes.
        """
        draw = torch.Generator().manual_seed(0)
        values = torch.rand(2, like.shape[-1], generator=draw) + 0.5  # away from 0, where nothing could be read
        values = values * torch.randint(0, 2, values.shape, generator=draw).mul(2).sub(1)
        v, w = values.to(like)
        with torch.no_grad():
            here, there, other = (function(value[None])[0].float() for value in (v, -v, w))
        shift = (here + there) / 2
        for centred in (False, True):
            scale = (here - there) / 2 / unit(v.float(), centred)
            found = Normalisation(scale, shift, centred)
            allowed = max(1e-4, 4 * torch.finfo(like.dtype).eps)
            if bool((found(w.float()) - other).norm() <= allowed * other.norm()):
                return found
        return None

    def __call__(self, v: Tensor) -> Tensor:
        """N(v), for v of shape (…, d)."""
        return self.scale.to(v) * unit(v, self.centred) + self.shift.to(v)

    def length(self, v: Tensor) -> Tensor:
        """What v is divided by, (…,)."""
        return _deviation(v, self.centred).square().mean(-1).sqrt()

    def moving(self, v: Tensor, wanted: Tensor) -> Tensor:
        """What to add to v so that N(v) moves by `wanted`, as far as it can, to first order.

        N'(v) δ = γ ⊙ P δ / length(v), with P taking off what is along v (and the mean, where it is centred). So

            δ = length(v) · P (γ ⊙ wanted ⊘ (γ² + ε)),

        where ε keeps what N hardly lets through, γ being next to 0, as it was.

        Args:
            v, wanted: (tokens, d).
        """
        gamma = self.scale.to(wanted)
        square = gamma.square()
        step = gamma * wanted / (square + PULL * square.median())
        along, length = unit(v, self.centred), self.length(v)[:, None]
        step = _deviation(step, self.centred)
        return length * (step - along * (step * along).mean(-1, keepdim=True))


def unit(v: Tensor, centred: bool) -> Tensor:
    """u(v): of mean square 1, and of mean 0 where it is centred."""
    away = _deviation(v, centred)
    return away / away.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)


def _deviation(v: Tensor, centred: bool) -> Tensor:
    return v - v.mean(-1, keepdim=True) if centred else v
