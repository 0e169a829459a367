"""What a fitted block is: a polynomial, in three exact forms.

* factored (:class:`surgery.lstsq.UnitPolynomials` between the two maps): what conversion works with;
* bilinear: a quadratic gated block as (A x + a) ⊙ (B x + b) → D + d, which is a stock gated block whose activation
  is the identity, with biases (:func:`bilinear`);
* dense: constant, linear and quadratic coefficients (α, β, Γ) in x, for small widths (:func:`expand_dense`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.lstsq import UnitPolynomials, solve_units
from surgery.moments import Preactivations, UnitMoments

OFFSET_LIMIT = 16.0  # |p|, in standard deviations of y: beyond it bf16 loses the product's digits to cancellation


@dataclass(frozen=True)
class Affine:
    """x ↦ weight x + bias; weight (out, in), float64."""

    weight: Tensor
    bias: Tensor


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


def guarded(moments: UnitMoments, units: UnitPolynomials, limit: float = OFFSET_LIMIT) -> UnitPolynomials:
    """Quadratic gated units, refitted where the bilinear form would be ill-conditioned.

    a0 + a1 u + a2 u² + b0 v + b1 u v = (u + p)(a2 u + b1 v + q) + r needs p = b0/b1, which diverges as b1 → 0.
    Units with |p| > limit are solved again among (u + p₀)(a2 u + b1 v + q) + r with p₀ = ±limit.
    """
    if units.b is None or units.degree != 2:
        raise ValueError("only quadratic gated units have a bilinear form")
    offset = _offset(units)
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


def _offset(units: UnitPolynomials) -> Tensor:
    assert units.b is not None
    b0, b1 = units.b[:, 0], units.b[:, 1]
    # A unit without v at all is (u + 0)(a2 u + q) + r.
    return torch.where((b0 == 0) & (b1 == 0), torch.zeros_like(b0), b0 / b1)


def _select(moments: UnitMoments, rows: Tensor) -> UnitMoments:
    def pick(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[rows]

    at = Preactivations(
        moments.at.y_mean[rows], moments.at.y_std[rows],
        pick(moments.at.z_mean), pick(moments.at.z_std), pick(moments.at.covariance),
    )  # fmt: skip
    return UnitMoments(
        moments.degree, at, moments.weight, moments.u[rows], moments.t[rows], moments.tt[rows],
        pick(moments.vu), pick(moments.vvu), pick(moments.tvu), moments.error,
    )  # fmt: skip


def bilinear(units: UnitPolynomials, gate: Affine, up: Affine) -> Bilinear:
    """(u + p)(a2 u + b1 v + q) + r with p = b0/b1, q = a1 − p a2, r = a0 − p q.

    Args:
        units: quadratic and gated, of u = gate(x), v = up(x), already :func:`guarded`.
    """
    assert units.b is not None and units.degree == 2
    p = _offset(units)
    a0, a1, a2 = units.a.unbind(-1)
    b1 = units.b[:, 1]
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


def expand_dense(
    units: UnitPolynomials, first: Affine, second: Affine | None, readout: Affine
) -> tuple[Tensor, Tensor, Tensor]:
    """(α, β, Γ) with f(x) = α + β x + xᵀ Γ x: shapes (o,), (o, d), (o, d, d), Γ symmetric.

    Degree 1 or 2 only. Memory o·d²: meant for small widths; nothing else in this package builds it.
    """
    if units.degree > 2:
        raise ValueError("the dense expansion is written for degree 1 and 2")
    w, c = first.weight, first.bias
    a = torch.cat([units.a, units.a.new_zeros(len(units.a), 2 - units.degree)], dim=-1)
    constant = a[:, 0] + a[:, 1] * c + a[:, 2] * c * c
    linear = (a[:, 1] + 2 * a[:, 2] * c)[:, None] * w
    left, right = a[:, 2, None] * w, w
    if units.b is not None and second is not None:
        b0 = units.b[:, 0]
        b1 = units.b[:, 1] if units.degree == 2 else torch.zeros_like(b0)
        constant = constant + (b0 + b1 * c) * second.bias
        linear = linear + (b0 + b1 * c)[:, None] * second.weight + (b1 * second.bias)[:, None] * w
        left = left + b1[:, None] * second.weight
    out = readout.weight
    gamma = torch.einsum("oh,hi,hj->oij", out, left, right)
    return readout.bias + out @ constant, out @ linear, (gamma + gamma.transpose(1, 2)) / 2
