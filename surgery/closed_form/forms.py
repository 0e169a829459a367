"""Affine maps, and the bilinear form of quadratic gated units.

A quadratic gated block is (A x + a) ⊙ (B x + b) → D + d: a stock gated block with biases whose activation is the
identity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.closed_form.least_squares import UnitPolynomials, solve_units
from surgery.closed_form.moments import UnitMoments

OFFSET_LIMIT = 16.0  # |p|, in standard deviations of y: beyond it bf16 loses the product's digits to cancellation


@dataclass(frozen=True)
class Affine:
    """x ↦ weight x + bias; weight (out, in), bias (out,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def to(self, dtype: torch.dtype) -> Affine:
        return Affine(self.weight.to(dtype), self.bias.to(dtype))

    def rows(self, kept: Tensor) -> Affine:
        """Some of its outputs, by number."""
        return Affine(self.weight[kept], self.bias[kept])

    def above(self, other: Affine) -> Affine:
        """Its outputs, and below them another's of the same input."""
        return Affine(torch.cat([self.weight, other.weight]), torch.cat([self.bias, other.bias]))


def standardised(weight: Tensor, bias: Tensor | None, mean: Tensor, std: Tensor) -> Affine:
    """The map whose output is u = (W x + b − m)/s: standardisation folded into the weights."""
    offset = -mean if bias is None else bias.double() - mean
    return Affine(weight.double() / std[:, None], offset / std)


@dataclass(frozen=True)
class Bilinear:
    """gate and up of a block whose hidden vector is gate(x) ⊙ up(x), plus what it leaves for the last bias.

    Attributes:
        gate, up: affine maps, (h, d).
        remainder: constant r of each unit, shape (h,); the last map adds W2 r to its bias.
        largest_offset: max |p| ÷ std(y), the conditioning of the factorisation.
    """

    gate: Affine
    up: Affine
    remainder: Tensor
    largest_offset: float


def balanced(gate: Affine, up: Affine, down: Affine) -> tuple[Affine, Affine, Affine]:
    """The same block, each unit's share in its three maps of one norm: α gate, β up and down ÷ (α β).

    A unit's product is the same for any α and β. Left as they come, rows of `up` are a tenth of the others and a sink
    unit's column of `down` is thousands: an optimiser that moves all weights alike would wreck the one and leave the
    other, and bfloat16 would spend its exponents. Units with a zero map stay as they are.

    Args:
        gate, up: (h, d); `down`: (out, h).
    """
    norms = torch.stack([gate.weight.norm(dim=1), up.weight.norm(dim=1), down.weight.norm(dim=0)])
    there = (norms > 0).all(0)
    common = norms.log().mean(0).exp()
    alpha, beta = (torch.where(there, common / norm, torch.ones_like(norm)) for norm in norms[:2])
    return (
        Affine(alpha[:, None] * gate.weight, alpha * gate.bias),
        Affine(beta[:, None] * up.weight, beta * up.bias),
        Affine(down.weight / (alpha * beta), down.bias),
    )


def guarded(moments: UnitMoments, units: UnitPolynomials, limit: float = OFFSET_LIMIT) -> UnitPolynomials:
    """Quadratic gated units, refitted where the bilinear form would be ill-conditioned.

    a0 + a1 u + a2 u² + b0 v + b1 u v = (u + p)(a2 u + b1 v + q) + r needs p = b0/b1, which diverges as b1 → 0.
    Units with |p| > limit are solved again among (u + p₀)(a2 u + b1 v + q) + r with p₀ = ±limit.
    """
    if units.b is None or units.degree != 2:
        raise ValueError("only quadratic gated units have a bilinear form")
    offset = _offset(units.b)
    bad = ~(offset.abs() <= limit)
    if not bad.any():
        return units
    p = offset.clamp(-limit, limit)[bad]
    basis = p.new_zeros(len(p), 5, 4)  # rows a0 a1 a2 b0 b1; columns r q a2 b1
    basis[:, 0, 0], basis[:, 0, 1] = 1, p
    basis[:, 1, 1], basis[:, 1, 2] = 1, p
    basis[:, 2, 2] = 1
    basis[:, 3, 3], basis[:, 4, 3] = p, 1
    again = solve_units(_select(moments, bad), basis)
    assert again.b is not None
    a, b, r2 = units.a.clone(), units.b.clone(), units.r2.clone()
    a[bad], b[bad], r2[bad] = again.a, again.b, again.r2
    return UnitPolynomials(a, b, r2, max(units.condition, again.condition), units.error)


def _offset(b: Tensor) -> Tensor:
    b0, b1 = b.unbind(-1)
    # A unit without v at all is (u + 0)(a2 u + q) + r.
    return torch.where((b0 == 0) & (b1 == 0), torch.zeros_like(b0), b0 / b1)


def _select(moments: UnitMoments, rows: Tensor) -> UnitMoments:
    """Of some units, by number or mask."""

    def picked(values: Any) -> dict[str, Any]:
        return {name: value[rows] for name, value in vars(values).items() if isinstance(value, Tensor)}

    return replace(moments, at=replace(moments.at, **picked(moments.at)), **picked(moments))


def bilinear(a: Tensor, b: Tensor, gate: Affine, up: Affine) -> Bilinear:
    """(u + p)(a2 u + b1 v + q) + r with p = b0/b1, q = a1 − p a2, r = a0 − p q.

    Args:
        a, b: coefficients of quadratic gated units of u = gate(x), v = up(x), (h, 3) and (h, 2), already
            :func:`guarded`.
    """
    p = _offset(b)
    a0, a1, a2 = a.unbind(-1)
    b1 = b[:, 1]
    q = a1 - p * a2
    return Bilinear(
        gate=Affine(gate.weight, gate.bias + p),
        up=Affine(
            a2[:, None] * gate.weight + b1[:, None] * up.weight,
            a2 * gate.bias + b1 * up.bias + q,
        ),
        remainder=a0 - p * q,
        largest_offset=float(p.abs().max()) if len(p) else 0.0,
    )
