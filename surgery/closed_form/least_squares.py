"""The closed form itself: normal equations per hidden unit.

A hidden unit sees the input only through its preactivation(s), so the least-squares optimal polynomial of the block
is the block with each unit's nonlinearity replaced by its own polynomial (under a Gaussian: exactly optimal among
all polynomials in x of that degree; under any other distribution: optimal among polynomials in the unit's own
preactivations):

    plain   p(u) = Σ_{k≤n} a_k u^k
    gated   p(u, v) = Σ_{k≤n} a_k u^k + v Σ_{k<n} b_k u^k

After Belrose & Rigg, arXiv 2502.01032, section 3, in factored form: O(h n) numbers, never d_out × d².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.closed_form.moments import UnitMoments

COLLINEAR = 1e-10  # eigenvalues below this share of the largest are noise: their directions get the smallest solution


@dataclass(frozen=True)
class UnitPolynomials:
    """The polynomial of every unit, in its standardised preactivations.

    Attributes:
        a: coefficients of u^k, ascending, float64, shape (h, n + 1).
        b: coefficients of v u^k, shape (h, n); None in a plain block.
        r2: share of the target's variance explained, in the moments the fit saw, shape (h,).
        condition: the largest condition number of a unit's scaled normal equations.
        error: quadrature error of the moments, relative (0 for data and exact formulas).
    """

    a: Tensor
    b: Tensor | None
    r2: Tensor
    condition: float
    error: float = 0.0

    @property
    def degree(self) -> int:
        return self.a.shape[-1] - 1

    def __call__(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        """p(u[, v]) for every unit, by Horner's rule; u, v of shape (..., h)."""
        value = horner(self.a.to(u), u)
        if v is not None and self.b is not None:
            value = torch.addcmul(value, horner(self.b.to(u), u), v)
        return value


def horner(coefficients: Tensor, u: Tensor) -> Tensor:
    """Σ_k c_k u^k per unit; coefficients (h, n + 1), ascending; u (..., h)."""
    powers = coefficients.T.contiguous()  # three times as fast as columns of a matrix
    value = powers[-1].expand_as(u)
    for lower in reversed(powers[:-1]):
        value = torch.addcmul(lower, value, u)
    return value


def normal_equations(moments: UnitMoments) -> tuple[Tensor, Tensor]:
    """Gram matrix and right side in the basis (1, u, …, u^n[, v, vu, …, vu^{n−1}]): (h, q, q) and (h, q)."""
    n = moments.degree
    plain = torch.arange(n + 1)
    gram = moments.u[:, plain[:, None] + plain]
    if not moments.gated:
        return gram, moments.t
    assert moments.vu is not None and moments.vvu is not None and moments.tvu is not None
    crossed = torch.arange(n)
    upper = moments.vu[:, plain[:, None] + crossed]
    lower = moments.vvu[:, crossed[:, None] + crossed]
    top = torch.cat([gram, upper], dim=-1)
    bottom = torch.cat([upper.transpose(-1, -2), lower], dim=-1)
    return torch.cat([top, bottom], dim=-2), torch.cat([moments.t, moments.tvu], dim=-1)


def solve_units(moments: UnitMoments, basis: Tensor | None = None) -> UnitPolynomials:
    """Least squares per unit.

    Args:
        moments: from data, a Gaussian or a mixture; the solution is optimal for whatever they describe.
        basis: optional (h, q, r) map: search only among coefficients `basis @ θ` (a linear constraint per unit).
    Directions in which the moments carry no information (a dead unit, a constant preactivation) get coefficient 0.
    Cost O(h q³), q = n + 1 or 2n + 1.
    """
    gram, right = normal_equations(moments)
    reduced_gram, reduced_right = gram, right
    if basis is not None:
        reduced_gram = basis.transpose(-1, -2) @ gram @ basis
        reduced_right = (basis.transpose(-1, -2) @ right[..., None])[..., 0]
    scale = reduced_gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    scaled = reduced_gram / (scale[:, :, None] * scale[:, None, :])
    values, vectors = torch.linalg.eigh(scaled)
    keep = values > COLLINEAR * values[:, -1:]
    inverse = torch.where(keep, 1 / values.clamp_min(1e-300), torch.zeros_like(values))
    projected = (vectors.transpose(-1, -2) @ (reduced_right / scale)[..., None])[..., 0]
    theta = (vectors @ (inverse * projected)[..., None])[..., 0] / scale
    solution = theta if basis is None else (basis @ theta[..., None])[..., 0]

    fitted = torch.einsum("hq,hqr,hr->h", solution, gram, solution)
    residual = moments.tt - 2 * (solution * right).sum(-1) + fitted
    variance = moments.tt - moments.t[:, 0].square() / moments.weight
    r2 = 1 - residual / variance.clamp_min(1e-300)
    r2 = torch.where(variance > 1e-14 * moments.tt.clamp_min(1e-300), r2, torch.ones_like(r2))
    condition = float((values[:, -1] / torch.where(keep, values, values[:, -1:]).amin(-1)).max())
    split = moments.degree + 1
    b = solution[:, split:] if moments.gated else None
    return UnitPolynomials(solution[:, :split], b, r2, condition, moments.error)
