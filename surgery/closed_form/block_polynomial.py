"""A block's polynomial taken apart: constant, linear and quadratic parts, for any direction of its output.

A block of a twin is f(x) = D p(G x + g, U x + e) + d, with p one polynomial per hidden unit. For an output direction w
the scalar q(x) = w·f(x) is expanded about a point m:

    q(x) = q(m) + β·(x − m) + (x − m)ᵀ Γ (x − m) + higher,   β = ∇q(m),   Γ = ½ ∇²q(m)

    Γ = Gᵀ diag(c ⊙ ½ p_uu) G + ½ (Gᵀ diag(c ⊙ p_uv) U + Uᵀ diag(c ⊙ p_uv) G),   c = Dᵀ w

p_uu, p_uv: the units' second derivatives at m; p_vv = 0. At degree 2 Γ is the same about every point, and for m = 0
these are the α, β, Γ of Belrose & Rigg, arXiv 2502.01032. Γ is an operator here: applied in O(h d), built in O(h d²),
never d_out × d × d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.closed_form.forms import Affine
from surgery.closed_form.least_squares import horner


@dataclass(frozen=True)
class BlockPolynomial:
    """f(x) = down(Σ_{k≤n} a_k u^k + v Σ_{k<n} b_k u^k), u = gate(x), v = up(x).

    Attributes:
        gate, up: affine maps d → h; up is None in a plain block.
        a: ascending coefficients of u^k, (h, n + 1).
        b: of v u^k, (h, n); None in a plain block.
        down: affine map h → out.
    """

    gate: Affine
    up: Affine | None
    a: Tensor
    b: Tensor | None
    down: Affine

    @staticmethod
    def affine(only: Affine) -> BlockPolynomial:
        """Of degree 1: the map itself, and the identity after it."""
        out = len(only.bias)
        a = only.bias.new_tensor([0.0, 1.0]).expand(out, 2)  # p(u) = u
        return BlockPolynomial(only, None, a, None, Affine(torch.eye(out).to(only.weight), torch.zeros_like(only.bias)))

    def as_affine(self) -> Affine:
        """The one map that a polynomial of degree 1 is; exactly the one it was made of by :meth:`affine`."""
        assert self.degree == 1
        expansion = self.to(torch.float64).expand()
        return Affine(expansion.jacobian(), expansion.constant)

    def to(self, dtype: torch.dtype) -> BlockPolynomial:
        """Its maps in another precision; coefficients as they are."""
        up = None if self.up is None else self.up.to(dtype)
        return BlockPolynomial(self.gate.to(dtype), up, self.a, self.b, self.down.to(dtype))

    @property
    def degree(self) -> int:
        """Total degree in x."""
        return self.a.shape[1] - 1

    @property
    def width(self) -> int:
        return self.gate.weight.shape[1]

    @property
    def out(self) -> int:
        return self.down.weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """The block's output for inputs of shape (tokens, d)."""
        u, v = self._preactivations(x)
        return self.down(self._units(u, v, 0, 0))

    def expand(self, point: Tensor | None = None) -> Expansion:
        """The Taylor expansion about `point`, shape (d,); about 0 if None. Cost O(h d)."""
        weight = self.gate.weight
        m = weight.new_zeros(self.width) if point is None else point.to(weight)
        u, v = self._preactivations(m[None])
        value, slope, cross, bend, twist = (
            self._units(u, v, *order)[0] for order in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1))
        )
        return Expansion(self, m, self.down(value[None])[0], slope, cross, bend / 2, twist)

    def _preactivations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.gate(x), None if self.up is None else self.up(x)

    def _units(self, u: Tensor, v: Tensor | None, by_u: int, by_v: int) -> Tensor:
        """The derivative ∂^i/∂u^i ∂^j/∂v^j of every unit's polynomial, j ≤ 1."""
        if self.b is None or v is None:
            return torch.zeros_like(u) if by_v else horner(_derived(self.a, by_u), u)
        crossed = horner(_derived(self.b, by_u), u)
        return crossed if by_v else horner(_derived(self.a, by_u), u) + crossed * v


@dataclass(frozen=True)
class Expansion:
    """A block about one point.

    Attributes:
        polynomial, point: what was expanded, and where: m, (d,).
        constant: f(m), (out,).
        slope, cross: first derivatives of the units in u and v, (h,).
        bend, twist: ½ p_uu and p_uv, (h,).
    """

    polynomial: BlockPolynomial
    point: Tensor
    constant: Tensor
    slope: Tensor
    cross: Tensor
    bend: Tensor
    twist: Tensor

    def linear(self, direction: Tensor) -> Tensor:
        """β = ∇(w·f)(m) for an output direction w, shape (out,) → (d,)."""
        c, poly = self._units_of(direction), self.polynomial
        found = (c * self.slope) @ poly.gate.weight
        return found if poly.up is None else found + (c * self.cross) @ poly.up.weight

    def jacobian(self) -> Tensor:
        """β for all outputs at once, (out, d)."""
        poly = self.polynomial
        units = self.slope[:, None] * poly.gate.weight
        if poly.up is not None:
            units = units + self.cross[:, None] * poly.up.weight
        return poly.down.weight @ units

    def quadratic(self, direction: Tensor, root: Tensor | None = None) -> Quadratic:
        """Γ for an output direction w, shape (out,), as an operator.

        Args:
            root: a matrix R, (d, d), to look at Rᵀ Γ R instead: with R = Σ^½ the spectrum of z ↦ zᵀ Rᵀ Γ R z, z white.
        """
        c, up = self._units_of(direction), self.polynomial.up
        weight = None if up is None else up.weight
        return Quadratic(self.polynomial.gate.weight, weight, c * self.bend, c * self.twist, root)

    def parts(self, direction: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(linear, quadratic, higher) parts of w·f(x) − w·f(m) at inputs (tokens, d); (tokens,) each."""
        poly, c = self.polynomial, self._units_of(direction)
        away = x.to(self.point) - self.point
        du = away @ poly.gate.weight.T
        linear, quadratic = du @ (c * self.slope), du.square() @ (c * self.bend)
        if poly.up is not None:
            dv = away @ poly.up.weight.T
            linear = linear + dv @ (c * self.cross)
            quadratic = quadratic + (du * dv) @ (c * self.twist)
        whole = (poly(x.to(self.point)) - self.constant) @ direction.to(self.point)
        return linear, quadratic, whole - linear - quadratic

    def output_gram(self, root: Tensor | None = None, chunk: int = 512) -> Tensor:
        """⟨Γ_o, Γ_p⟩_F for all pairs of outputs, (out, out): its eigenvectors are the block's own output directions.

        They are the left singular vectors of the third-order tensor unfolded to out × d² (after Pearce et al.,
        arXiv 2410.08417), from the h × h inner products of the units' matrices, `chunk` rows at a time. Cost O(h² d).
        """
        poly = self.polynomial
        g = poly.gate.weight if root is None else poly.gate.weight @ root
        up = poly.gate.weight.new_zeros(g.shape) if poly.up is None else poly.up.weight
        u = up if root is None else up @ root
        total = g.new_zeros(poly.out, poly.out)
        for rows in torch.arange(len(g), device=g.device).split(chunk):
            gg, gu, ug, uu = g[rows] @ g.T, g[rows] @ u.T, u[rows] @ g.T, u[rows] @ u.T
            s, t = self.bend[rows, None], self.twist[rows, None]
            inner = gg * (s * self.bend * gg + s * self.twist * gu + t * self.bend * ug + t * self.twist * uu / 2)
            inner += t * self.twist * gu * ug / 2
            total += poly.down.weight[:, rows] @ inner @ poly.down.weight.T
        return (total + total.T) / 2

    def _units_of(self, direction: Tensor) -> Tensor:
        if direction.shape != (self.polynomial.out,):
            raise ValueError(f"an output direction has {self.polynomial.out} entries, not {tuple(direction.shape)}")
        return direction.to(self.point) @ self.polynomial.down.weight


@dataclass(frozen=True)
class Quadratic:
    """The symmetric matrix RᵀΓR, in factors.

    Attributes:
        gate, up: G and U, (h, d); up None in a plain block.
        bend, twist: c ⊙ ½ p_uu and c ⊙ p_uv, (h,).
        root: R, or None for the identity.
    """

    gate: Tensor
    up: Tensor | None
    bend: Tensor
    twist: Tensor
    root: Tensor | None = None

    @property
    def size(self) -> int:
        return self.gate.shape[1]

    def __matmul__(self, x: Tensor) -> Tensor:
        """Γ x for columns x, (d, k); cost O(h d k), memory O((h + d) k)."""
        if self.root is not None:
            x = self.root @ x
        u = self.gate @ x
        inner = self.bend[:, None] * u
        if self.up is None:
            found = self.gate.T @ inner
        else:
            inner = inner + self.twist[:, None] * (self.up @ x) / 2
            found = self.gate.T @ inner + self.up.T @ (self.twist[:, None] * u / 2)
        return found if self.root is None else self.root.T @ found

    def dense(self) -> Tensor:
        """The matrix itself, (d, d); cost O(h d²)."""
        left = self.bend[:, None] * self.gate
        if self.up is not None:
            left = left + self.twist[:, None] * self.up
        product = self.gate.T @ left
        product = (product + product.T) / 2
        return product if self.root is None else self.root.T @ product @ self.root


def _derived(coefficients: Tensor, times: int) -> Tensor:
    """Coefficients (h, n + 1) of the derivative; a constant's is a zero."""
    for _ in range(times):
        powers = torch.arange(coefficients.shape[1], device=coefficients.device).to(coefficients)
        coefficients = (coefficients * powers)[:, 1:]
        if not coefficients.shape[1]:
            return coefficients.new_zeros(len(coefficients), 1)
    return coefficients
