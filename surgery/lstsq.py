"""The closed form itself: normal equations per hidden unit, and the ridge for the readout.

A hidden unit sees the input only through its preactivation(s), so the least-squares optimal polynomial of the block
is the block with each unit's nonlinearity replaced by its own polynomial (under a Gaussian: exactly optimal among
all polynomials in x of that degree; under any other distribution: optimal among polynomials in the unit's own
preactivations):

    plain   p(u) = Σ_{k≤n} a_k u^k
    gated   p(u, v) = Σ_{k≤n} a_k u^k + v Σ_{k<n} b_k u^k

After Belrose & Rigg, arXiv 2502.01032, section 3, in factored form: O(h n) numbers, never d_out × d².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.moments import UnitMoments

JITTER = 1e-13  # of the constant's own sum: keeps a Cholesky factor defined, changes no digit
COLLINEAR = 1e-10  # eigenvalues below this share of the largest are noise: their directions get the smallest answer


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
        value = _horner(self.a.to(u), u)
        if v is not None and self.b is not None:
            value = torch.addcmul(value, _horner(self.b.to(u), u), v)
        return value


def _horner(coefficients: Tensor, u: Tensor) -> Tensor:
    value = coefficients[:, -1].expand_as(u)
    for k in range(coefficients.shape[-1] - 2, -1, -1):
        value = torch.addcmul(coefficients[:, k], value, u)
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
        moments: from data, a Gaussian or a mixture; the answer is optimal for whatever they describe.
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


@dataclass(frozen=True)
class RidgeSums:
    """Sums for regressing targets on features: Fᵀ W F, Fᵀ W T, and what R² needs; float64.

    Attributes:
        weight: Σ w, a scalar.
        gram: shape (p, p); the last feature is the constant 1.
        cross: shape (p, q).
        target_square: Σ w t², shape (q,).
    """

    weight: Tensor
    gram: Tensor
    cross: Tensor
    target_square: Tensor

    @staticmethod
    def of(features: Tensor, targets: Tensor) -> RidgeSums:
        """Sums over rows. `features` already ends in the constant; rows may be scaled by √weight (both sides)."""
        return RidgeSums(
            features[:, -1].double().square().sum(),
            symmetric_product(features).double(),
            (features.T @ targets).double(),
            targets.double().square().sum(0),
        )

    def add_(self, other: RidgeSums) -> None:
        """Adds in place: the Gram matrix is the largest thing here, and a copy per chunk would double it."""
        self.weight.add_(other.weight)
        self.gram.add_(other.gram)
        self.cross.add_(other.cross)
        self.target_square.add_(other.target_square)

    def __add__(self, other: RidgeSums) -> RidgeSums:
        return RidgeSums(
            self.weight + other.weight,
            self.gram + other.gram,
            self.cross + other.cross,
            self.target_square + other.target_square,
        )

    def residual(self, solution: Tensor) -> float:
        """Σ w ‖t − Bᵀ f‖² for B of shape (p, q)."""
        fitted = (solution * (self.gram @ solution)).sum()
        return float(self.target_square.sum() - 2 * (solution * self.cross).sum() + fitted)

    def r2(self, solution: Tensor) -> float:
        """1 − residual ÷ variance of the targets about their mean, over all outputs."""
        variance = self.target_square.sum() - self.cross[-1].square().sum() / self.weight
        return 1 - self.residual(solution) / float(variance.clamp_min(1e-300))


def symmetric_product(features: Tensor, parts: int = 4) -> Tensor:
    """FᵀF, computing only the blocks on and above the diagonal (5/8 of the work at four parts)."""
    p = features.shape[1]
    out = features.new_empty(p, p)
    edges = [p * k // parts for k in range(parts + 1)]
    for i in range(parts):
        rows = slice(edges[i], edges[i + 1])
        tail = slice(edges[i], p)
        block = features[:, rows].T @ features[:, tail]
        out[rows, tail] = block
        out[tail, rows] = block.T
    return out


USUAL_RIDGE = 0.3
RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Readout:
    """The re-solved last map.

    Attributes:
        weight: shape (p, q), the constant's row last.
        ridge: λ chosen, as a share of the mean squared feature.
        r2_fit, r2_held: on the tokens fitted, and on the held-out ones, at that λ.
        r2_prior: held-out R² of the prior (the original readout) for comparison.
        condition: of the regularised normal equations, estimated from the Cholesky factor's diagonal.
    """

    weight: Tensor
    ridge: float
    r2_fit: float
    r2_held: float
    r2_prior: float
    condition: float


def ridge_path(
    fit: RidgeSums,
    held: RidgeSums,
    prior: Tensor,
    ridges: Sequence[float] = RIDGES,
    anchor: RidgeSums | None = None,
    free: int = 1,
) -> Readout:
    """min_B Σ w‖t − Bᵀf‖² + λ·n·mean(f²)·‖B − prior‖², λ chosen on held-out tokens, then solved on all of them.

    Args:
        fit, held: sums over the tokens to fit and to choose on.
        prior: shape (p, q), what B is pulled towards.
        free: how many of the last features (sink units, the constant) are not pulled.
        anchor: sums that belong to every fit but to neither score (attention sinks).
    The path is walked downhill from the usual λ, so most of it is never solved.
    """
    ordered = sorted(ridges)
    base = fit if anchor is None else fit + anchor

    def solve(sums: RidgeSums, size: RidgeSums, ridge: float) -> tuple[Tensor, float]:
        penalty = torch.full_like(sums.gram[0], ridge * float(size.gram.diagonal()[:-free].mean()))
        penalty[-free:] = JITTER * sums.gram.diagonal()[-free:]
        system = sums.gram + torch.diag(penalty)
        factor = torch.linalg.cholesky(system)
        pivots = factor.diagonal().square()
        solution = prior + torch.cholesky_solve(sums.cross - sums.gram @ prior, factor)
        return solution, float(pivots.max() / pivots.min())

    scores: dict[int, tuple[float, Tensor]] = {}

    def score(index: int) -> float:
        if not 0 <= index < len(ordered):
            return float("inf")
        if index not in scores:
            solution, _ = solve(base, fit, ordered[index])
            scores[index] = (held.residual(solution), solution)
        return scores[index][0]

    best = min(range(len(ordered)), key=lambda index: abs(math.log(ordered[index] / USUAL_RIDGE)))
    step = 1 if score(best + 1) < score(best) else -1
    while score(best + step) < score(best):
        best += step
    best_solution = scores[best][1]
    everything = base + held
    weight, condition = solve(everything, fit + held, ordered[best])
    return Readout(weight, ordered[best], fit.r2(best_solution), held.r2(best_solution), held.r2(prior), condition)
