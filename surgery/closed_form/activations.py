"""Activations and their expectations under a Gaussian.

One row per activation: its function and, where one exists, the exact value of

    c_k(m, s) = E[σ(m + s U) He_k(U)],   U ~ N(0, 1),   He_k the probabilists' Hermite polynomials,

for every degree k. By Stein's lemma c_k = s^k E[σ^(k)(m + s U)], which is closed for ReLU, ReLU², GELU and the
identity. Everything else is integrated by the trapezoidal rule on U, which converges exponentially for functions
analytic in a strip (Trefethen & Weideman, SIAM Review 56, 2014); its error is estimated by halving the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ScalarFunction = Callable[[Tensor], Tensor]

QUADRATURE_RANGE = 12.0  # |U| beyond which N(0, 1) holds less than 1e-32
QUADRATURE_NODES = 2048
QUADRATURE_BUDGET = 1 << 24  # units × nodes held at once, float64


def _phi(t: Tensor) -> Tensor:
    return torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)


def _cdf(t: Tensor) -> Tensor:
    result: Tensor = torch.special.ndtr(t)
    return result


def hermite_values(u: Tensor, degree: int) -> Tensor:
    """He_0(u) … He_degree(u), stacked on a new last dimension."""
    rows = [torch.ones_like(u), u]
    for k in range(1, degree):
        rows.append(u * rows[k] - k * rows[k - 1])
    return torch.stack(rows[: degree + 1], dim=-1)


def _identity(m: Tensor, s: Tensor, degree: int) -> Tensor:
    out = torch.zeros(*m.shape, degree + 1, dtype=m.dtype, device=m.device)
    out[..., 0] = m
    if degree >= 1:
        out[..., 1] = s
    return out


def _relu(m: Tensor, s: Tensor, degree: int) -> Tensor:
    t = m / s
    density, below = _phi(t), _cdf(t)
    out = [m * below + s * density, s * below]
    he = hermite_values(t, max(degree - 2, 0))
    for k in range(2, degree + 1):  # E[δ^(j)(m + sU)] by parts, j = k - 2
        out.append(s * (-1) ** k * he[..., k - 2] * density)
    return torch.stack(out[: degree + 1], dim=-1)


def _relu2(m: Tensor, s: Tensor, degree: int) -> Tensor:
    t = m / s
    head = (m * m + s * s) * _cdf(t) + m * s * _phi(t)
    if degree == 0:
        return head[..., None]
    return torch.cat([head[..., None], 2 * s[..., None] * _relu(m, s, degree - 1)], dim=-1)


def _gelu(m: Tensor, s: Tensor, degree: int) -> Tensor:
    # With ρ² = 1 + s², E[Φ^(j)(m + sU)] = d^j/dm^j Φ(m/ρ); y·Φ(y) follows by Leibniz and Stein.
    rho = torch.sqrt(1 + s * s)
    tau = m / rho
    he, density = hermite_values(tau, degree + 1), _phi(tau)
    d = [_cdf(tau)]
    for j in range(1, degree + 2):
        d.append((-1) ** (j - 1) * he[..., j - 1] * density / rho**j)
    out = []
    for k in range(degree + 1):
        derivative = m * d[k] + s * s * d[k + 1]
        if k:
            derivative = derivative + k * d[k - 1]
        out.append(s**k * derivative)
    return torch.stack(out, dim=-1)


@dataclass(frozen=True)
class Activation:
    """An elementwise nonlinearity σ.

    Attributes:
        name: its usual name, or the name of the callable it was made from.
        function: σ, elementwise.
        exact: (m, s, degree) -> E[σ(m + sU) He_k(U)] for k = 0 … degree, or None where quadrature is used.
        square_exact: the same for σ².
        joint: in a gated unit that is not σ(y)·z, the function of y and z that it is; it is fitted from data only.
    """

    name: str
    function: ScalarFunction
    exact: Callable[[Tensor, Tensor, int], Tensor] | None = None
    square_exact: Callable[[Tensor, Tensor, int], Tensor] | None = None
    joint: Callable[[Tensor, Tensor], Tensor] | None = None

    def unit(self, y: Tensor, z: Tensor | None) -> Tensor:
        """A hidden unit's value: σ(y), or σ(y)·z in a gated block."""
        if z is None:
            return self.function(y)
        return self.function(y) * z if self.joint is None else self.joint(y, z)

    def squared(self) -> Activation:
        """σ², for second moments."""
        return Activation(f"{self.name} squared", lambda x: self.function(x).square(), self.square_exact)

    def hermite_expectations(self, m: Tensor, s: Tensor, degree: int) -> tuple[Tensor, float]:
        """E[σ(m + sU) He_k(U)] for k = 0 … degree.

        Args:
            m, s: mean and standard deviation of each unit, float64, shape (h,).
            degree: the highest k.
        Returns:
            shape (h, degree + 1), and the estimated absolute error relative to the largest value
            (0 where the formula is exact).
        """
        if self.exact is not None:
            return self.exact(m, s, degree), 0.0
        return quadrature(self.function, m, s, degree)


def quadrature(function: ScalarFunction, m: Tensor, s: Tensor, degree: int) -> tuple[Tensor, float]:
    """Trapezoidal rule for E[f(m + sU) He_k(U)], k ≤ degree, with an error estimate.

    Returns:
        shape (h, degree + 1), float64, and max |fine − coarse| ÷ max |fine|. A kink in f makes the error
        fall only with the square of the step; the estimate shows it.
    """
    u = torch.linspace(-QUADRATURE_RANGE, QUADRATURE_RANGE, QUADRATURE_NODES + 1, dtype=m.dtype, device=m.device)
    step = 2 * QUADRATURE_RANGE / QUADRATURE_NODES
    weighted = hermite_values(u, degree) * (_phi(u) * step)[:, None]
    rows = max(1, QUADRATURE_BUDGET // len(u))
    fine, coarse = [], []
    for start in range(0, len(m), rows):
        part = slice(start, start + rows)
        values = function(m[part, None] + s[part, None] * u)
        fine.append(values @ weighted)
        coarse.append(values[:, ::2] @ (2 * weighted[::2]))
    result = torch.cat(fine)
    error = (result - torch.cat(coarse)).abs().max() / result.abs().max().clamp_min(1e-300)
    return result, float(error)


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("linear", lambda x: x, _identity),
        Activation("relu", F.relu, _relu, _relu2),
        Activation("relu2", lambda x: F.relu(x).square(), _relu2),
        Activation("gelu", F.gelu, _gelu),
        Activation("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        Activation("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        Activation("silu", F.silu),
        Activation("mish", F.mish),
        Activation("sigmoid", torch.sigmoid),
        Activation("tanh", torch.tanh),
        Activation("softplus", F.softplus),
    )
}

_FAR = torch.tensor([-80.0, -25.0, 12.0, 25.0, 80.0], dtype=torch.float64)  # where some are clipped (GELU-10)
_PROBE = torch.cat([torch.linspace(-9.0, 9.0, 61, dtype=torch.float64), _FAR])


def recognise(function: ScalarFunction, fallback_name: str) -> Activation | None:
    """The row whose values agree with `function`, else a nameless elementwise one, else None.

    The comparison is numerical, on a grid, so a model's own implementation of a known activation is recognised
    whatever it is called. None means that `function` is not elementwise (its values depend on their neighbours).
    """
    with torch.no_grad():
        values = function(_PROBE.clone())
        if not isinstance(values, Tensor) or values.shape != _PROBE.shape:
            return None
        for row in ACTIVATIONS.values():
            if torch.allclose(values, row.function(_PROBE), rtol=1e-6, atol=1e-7):
                return row
        order = torch.randperm(len(_PROBE), generator=torch.Generator().manual_seed(0))
        alone = torch.stack([function(value[None])[0] for value in _PROBE])
        if not torch.allclose(function(_PROBE[order]), values[order]) or not torch.allclose(alone, values):
            return None
    return Activation(fallback_name, function)
