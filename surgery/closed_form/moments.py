"""What the closed form needs to know: expectations, from data or from a Gaussian.

Two kinds of statistics, both additive over batches, files and machines:

* :class:`InputMoments`: mean μ and covariance Σ of the block's input.
* :class:`UnitMoments`: per hidden unit, the moments of its standardised preactivations and their products with the
  target. With u = (y − m)/s (and v = (z − m_z)/s_z in a gated block) and target t = σ(y), or t = σ(y)·z:

      E[u^j], E[v u^j], E[v² u^j], E[t u^j], E[t v u^j], E[t²]

  which is all that the normal equations of a degree-n unit contain. Numbers per unit: O(n); never d.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from surgery.closed_form.activations import Activation


def at_least_float32(x: Tensor) -> Tensor:
    """In float32, if it was in less: a covariance rounded to bfloat16 is not positive, and powers overflow float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class InputMoments:
    """Sums of x and x xᵀ over tokens, float64.

    Attributes:
        count: number of tokens (or total weight).
        total: Σ_t x_t, shape (d,).
        square: Σ_t x_t x_tᵀ, shape (d, d).
    """

    count: float
    total: Tensor
    square: Tensor

    @staticmethod
    def of(x: Tensor, chunk: int = 4096) -> InputMoments:
        """Sums over the rows of `x`, shape (tokens, d); a chunk at a time, so the copy stays small."""
        d = x.shape[-1]
        result = InputMoments(0.0, x.new_zeros(d, dtype=torch.float64), x.new_zeros(d, d, dtype=torch.float64))
        for part in map(at_least_float32, x.split(chunk)):
            result = result + InputMoments(float(len(part)), part.double().sum(0), (part.T @ part).double())
        return result

    @staticmethod
    def gaussian(mean: Tensor, covariance: Tensor) -> InputMoments:
        """The moments of N(μ, Σ), as if of one token."""
        mean = mean.double()
        return InputMoments(1.0, mean, covariance.double() + torch.outer(mean, mean))

    def __add__(self, other: InputMoments) -> InputMoments:
        return InputMoments(self.count + other.count, self.total + other.total, self.square + other.square)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        return self.square / self.count - torch.outer(self.mean, self.mean)

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` rows of the Gaussian with these moments, (count, d)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, len(values), generator=generator, dtype=torch.float64).to(vectors)
        spread: Tensor = (noise * values.clamp_min(0).sqrt()) @ vectors.T
        return self.mean + spread


@dataclass(frozen=True)
class Preactivations:
    """Mean, standard deviation and covariance of each unit's preactivations, float64, shape (h,) each.

    `z` fields are None for a plain block. Standard deviations are floored: a dead unit has scale 1.
    """

    y_mean: Tensor
    y_std: Tensor
    z_mean: Tensor | None = None
    z_std: Tensor | None = None
    covariance: Tensor | None = None

    @staticmethod
    def of(
        inputs: InputMoments, first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None] | None = None
    ) -> Preactivations:
        """From the input's moments and the (weight, bias) of the gate (or only) and up maps. Cost O(h d²)."""
        mean, covariance = inputs.mean, inputs.covariance

        def one(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            w = weight.double()
            spread = w @ covariance
            variance = (spread * w).sum(-1)
            floor = 1e-18 * (w.square().sum(-1) * covariance.diagonal().mean().clamp_min(0)) + 1e-30
            std = torch.where(variance > floor, variance.clamp_min(0).sqrt(), torch.ones_like(variance))
            location = w @ mean
            return (location if bias is None else location + bias.double()), std, spread

        y_mean, y_std, spread = one(*first)
        if second is None:
            return Preactivations(y_mean, y_std)
        z_mean, z_std, _ = one(*second)
        return Preactivations(y_mean, y_std, z_mean, z_std, (spread * second[0].double()).sum(-1))

    def widened(self, by: float) -> Preactivations:
        """The same means, with standard deviations `by` times as large."""
        z_std = None if self.z_std is None else self.z_std * by
        covariance = None if self.covariance is None else self.covariance * by**2
        return replace(self, y_std=self.y_std * by, z_std=z_std, covariance=covariance)


@dataclass(frozen=True)
class UnitMoments:
    """Weighted sums per hidden unit, float64; divide by `weight` for expectations.

    Attributes:
        degree: n, the degree of the polynomials these moments suffice for.
        at: the standardisation u, v refer to. Only moments with the same one can be added.
        weight: total weight of the tokens.
        u: Σ u^j, j ≤ 2n, shape (h, 2n + 1).
        t: Σ t u^j, j ≤ n, shape (h, n + 1).
        tt: Σ t², shape (h,).
        vu, vvu, tvu: Σ v u^j (j ≤ 2n − 1), Σ v² u^j (j ≤ 2n − 2), Σ t v u^j (j ≤ n − 1); None in a plain block.
        error: quadrature error, relative (0 for data and for exact formulas).
    """

    degree: int
    at: Preactivations
    weight: float
    u: Tensor
    t: Tensor
    tt: Tensor
    vu: Tensor | None = None
    vvu: Tensor | None = None
    tvu: Tensor | None = None
    error: float = 0.0

    @property
    def gated(self) -> bool:
        return self.vu is not None

    def __add__(self, other: UnitMoments) -> UnitMoments:
        if self.degree != other.degree or (self.at is not other.at and not _same(self.at, other.at)):
            raise ValueError("moments about different points, or for different degrees, cannot be added")
        sums: dict[str, Any] = {}
        for name in ("u", "t", "tt", "vu", "vvu", "tvu"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                sums[name] = mine + theirs
        return replace(self, weight=self.weight + other.weight, error=max(self.error, other.error), **sums)

    def __mul__(self, factor: float) -> UnitMoments:
        """The same distribution, counted `factor` times: how mixtures and priors are weighted."""
        sums = {name: getattr(self, name) for name in ("u", "t", "tt", "vu", "vvu", "tvu")}
        scaled = {name: value * factor for name, value in sums.items() if value is not None}
        return replace(self, weight=self.weight * factor, **scaled)


def _same(a: Preactivations, b: Preactivations) -> bool:
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return all((p is None and q is None) or torch.equal(p, q) for p, q in pairs)


def from_data(
    activation: Activation, at: Preactivations, y: Tensor, z: Tensor | None, degree: int, chunk: int = 512
) -> UnitMoments:
    """Moments of the rows of `y` (and `z`), shape (tokens, h) each.

    Products are formed in the inputs' precision, float32 at least, a chunk of tokens at a time; sums across chunks are
    float64.
    """
    plan = _Powers(degree, gated=z is not None)
    result: UnitMoments | None = None
    for start in range(0, len(y), chunk):
        y_part = at_least_float32(y[start : start + chunk])
        u = (y_part - at.y_mean.to(y_part)) * (1 / at.y_std).to(y_part)
        z_part, v = None, None
        if z is not None:
            assert at.z_mean is not None and at.z_std is not None
            z_part = at_least_float32(z[start : start + chunk])
            v = (z_part - at.z_mean.to(z_part)) * (1 / at.z_std).to(z_part)
        part = plan.sums(at, u, v, activation.unit(y_part, z_part))
        result = part if result is None else result + part
    if result is None:
        raise ValueError("no tokens")
    return result


class _Powers:
    """Which powers of u go with 1, v, v², t and t·v in the normal equations of degree n."""

    def __init__(self, degree: int, gated: bool) -> None:
        self.degree, self.gated = degree, gated

    def sums(self, at: Preactivations, u: Tensor, v: Tensor | None, t: Tensor) -> UnitMoments:
        n = self.degree

        def ladder(first: Tensor, highest: int) -> Tensor:
            rows, term = [first.sum(0).double()], first
            for _ in range(highest):
                term = term * u
                rows.append(term.sum(0).double())
            return torch.stack(rows, dim=-1)

        ones = torch.full((u.shape[1], 1), float(len(u)), dtype=torch.float64, device=u.device)
        powers = torch.cat([ones, ladder(u, 2 * n - 1)], dim=-1)
        own = ladder(t, n)
        moments = UnitMoments(n, at, float(len(u)), powers, own, t.square().sum(0).double())
        if v is None:
            return moments
        return replace(moments, vu=ladder(v, 2 * n - 1), vvu=ladder(v * v, 2 * n - 2), tvu=ladder(t * v, n - 1))


def from_gaussian(
    activation: Activation, at: Preactivations, units: Preactivations, degree: int, weight: float = 1.0
) -> UnitMoments:
    """Moments of units whose preactivations are Gaussian with the means and covariances `units`, about `at`.

    y = m + s U and z = m_z + r s_z U + √(1 − r²) s_z ε with U, ε independent N(0, 1), so every moment is a
    polynomial in U against 1, σ or σ², and those are :meth:`Activation.hermite_expectations`.
    A mixture of Gaussians is the sum of its components' moments, each with its share as `weight`.
    """
    n, gated = degree, units.z_mean is not None
    highest = 2 * n + 2
    flat = _normal_moments(highest, units.y_mean)
    expectations, error = activation.hermite_expectations(units.y_mean, units.y_std, n + 3)
    sigma = _monomials_from_hermite(expectations)
    squares, _ = activation.squared().hermite_expectations(units.y_mean, units.y_std, 2)
    sigma2 = _monomials_from_hermite(squares)

    ones = torch.ones_like(units.y_mean)[:, None]
    u = torch.stack([(units.y_mean - at.y_mean) / at.y_std, units.y_std / at.y_std], dim=-1)
    powers = [ones]
    for _ in range(2 * n):
        powers.append(_times(powers[-1], u))

    def expect(poly: Tensor, against: Tensor) -> Tensor:
        return (poly * against[:, : poly.shape[1]]).sum(-1) * weight

    def ladder(factor: Tensor, highest: int, against: Tensor) -> Tensor:
        return torch.stack([expect(_times(factor, powers[j]), against) for j in range(highest + 1)], dim=-1)

    if not gated:
        return UnitMoments(
            n, at, weight, ladder(ones, 2 * n, flat), ladder(ones, n, sigma), expect(ones, sigma2), error=error
        )
    assert units.z_mean is not None and units.z_std is not None and units.covariance is not None
    assert at.z_mean is not None and at.z_std is not None
    slope = units.covariance / units.y_std  # Cov(z, U)
    rest = (units.z_std.square() - slope.square()).clamp_min(0)  # variance of z left when U is known
    z = torch.stack([units.z_mean, slope], dim=-1)
    v = torch.stack([(units.z_mean - at.z_mean) / at.z_std, slope / at.z_std], dim=-1)
    vv = _plus_constant(_times(v, v), rest / at.z_std.square())
    zv = _plus_constant(_times(z, v), rest / at.z_std)
    zz = _plus_constant(_times(z, z), rest)
    crossed = {"vu": ladder(v, 2 * n - 1, flat), "vvu": ladder(vv, 2 * n - 2, flat), "tvu": ladder(zv, n - 1, sigma)}
    own = ladder(ones, 2 * n, flat), ladder(z, n, sigma), expect(zz, sigma2)
    return UnitMoments(n, at, weight, *own, **crossed, error=error)


def _times(p: Tensor, q: Tensor) -> Tensor:
    """Product of polynomials given by ascending coefficients on the last dimension."""
    out = p.new_zeros(p.shape[0], p.shape[1] + q.shape[1] - 1)
    for k in range(q.shape[1]):
        out[:, k : k + p.shape[1]] += p * q[:, k, None]
    return out


def _plus_constant(p: Tensor, constant: Tensor) -> Tensor:
    return torch.cat([p[:, :1] + constant[:, None], p[:, 1:]], dim=-1)


def _normal_moments(highest: int, like: Tensor) -> Tensor:
    """E[U^k] for k ≤ highest: (k − 1)!! for even k."""
    values = [1.0, 0.0]
    for k in range(2, highest + 1):
        values.append((k - 1) * values[k - 2])
    return torch.tensor(values[: highest + 1], dtype=like.dtype, device=like.device).expand(len(like), -1)


def _monomials_from_hermite(expectations: Tensor) -> Tensor:
    """E[f U^k] from E[f He_k(U)]: U·He_k = He_{k+1} + k He_{k−1}, applied k times to He_0."""
    size = expectations.shape[-1]
    row = torch.zeros(size, dtype=expectations.dtype, device=expectations.device)
    row[0] = 1.0
    weights = torch.arange(size, dtype=expectations.dtype, device=expectations.device)
    out = []
    for _ in range(size):
        out.append(expectations @ row)
        row = torch.cat([torch.zeros_like(row[:1]), row[:-1]]) + torch.cat(
            [(weights * row)[1:], torch.zeros_like(row[:1])]
        )
    return torch.stack(out, dim=-1)


@dataclass(frozen=True)
class GaussianMixture:
    """A Gaussian, or a mixture of them, for a block's input: weights (k,), means (k, d), covariances (k, d, d)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weights, self.means, self.covariances
