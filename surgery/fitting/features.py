"""A block's hidden vector, as its polynomial computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgery.blocks.weights import BlockWeights, Map
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine, standardised
from surgery.closed_form.least_squares import UnitPolynomials
from surgery.closed_form.moments import Preactivations

CACHED = 512  # tokens whose hidden vectors are computed at once: few enough to stay in a processor's cache


@dataclass(frozen=True)
class HiddenPolynomial:
    """x ↦ (hidden vector of the polynomial, 1); of degree 1, (x, 1).

    Attributes:
        gate, up: affine maps to the standardised u and v, sink units last; up is None in a plain block.
        units: their polynomials.
    """

    gate: Affine
    up: Affine | None
    units: UnitPolynomials

    @staticmethod
    def of(original: BlockWeights, at: Preactivations, units: UnitPolynomials) -> HiddenPolynomial:
        """Of a block's own first maps, standardised as the units are."""
        gate = standardised(*original.gate, at.y_mean, at.y_std)
        if original.up is None:
            return HiddenPolynomial(gate, None, units)
        assert at.z_mean is not None and at.z_std is not None
        return HiddenPolynomial(gate, standardised(*original.up, at.z_mean, at.z_std), units)

    def __call__(self, x: Tensor) -> Tensor:
        if self.units.degree == 1:
            return torch.cat([x, x.new_ones(len(x), 1)], dim=-1)
        return _vectors(x, self.units, lambda rows: (self.gate(rows), None if self.up is None else self.up(rows)))

    def to(self, dtype: torch.dtype) -> HiddenPolynomial:
        """The same in the precision that a network computes in."""
        b = None if self.units.b is None else self.units.b.to(dtype)
        units = replace(self.units, a=self.units.a.to(dtype), b=b)
        up = None if self.up is None else self.up.to(dtype)
        return HiddenPolynomial(self.gate.to(dtype), up, units)

    def with_sink_units(self, pointing: Affine) -> HiddenPolynomial:
        """One more unit, u², for each row of `pointing`."""
        extra, units = len(pointing.bias), self.units
        if not extra:
            return self
        zero = Affine(torch.zeros_like(pointing.weight), torch.zeros_like(pointing.bias))
        squares = units.a.new_zeros(extra, units.a.shape[1])
        squares[:, 2] = 1
        b = None if units.b is None else torch.cat([units.b, units.b.new_zeros(extra, units.b.shape[1])])
        r2 = torch.cat([units.r2, units.r2.new_ones(extra)])
        return HiddenPolynomial(
            self.gate.above(pointing),
            None if self.up is None else self.up.above(zero),
            replace(units, a=torch.cat([units.a, squares]), b=b, r2=r2),
        )

    def with_readout(self, readout: Affine) -> BlockPolynomial:
        """The block's polynomial; of degree 1 it is the readout itself."""
        if self.units.degree == 1:
            return BlockPolynomial.affine(readout)
        return BlockPolynomial(self.gate, self.up, self.units.a, self.units.b, readout)

    def keep_units(self, kept: Tensor) -> HiddenPolynomial:
        """The units with these numbers."""
        units = self.units
        b = None if units.b is None else units.b[kept]
        up = None if self.up is None else self.up.rows(kept)
        return HiddenPolynomial(self.gate.rows(kept), up, replace(units, a=units.a[kept], b=b, r2=units.r2[kept]))

    def prior_readout(self, last: Map) -> Tensor:
        """The original readout on these features, (p, out) float64; sink units 0, of degree 1 with units folded in."""
        weight, bias = last
        down, units = weight.double(), self.units
        offset = down.new_zeros(len(down)) if bias is None else bias.double()
        if units.degree == 1:
            linear = units.a[:, 1, None] * self.gate.weight
            constant = units.a[:, 0] + units.a[:, 1] * self.gate.bias
            if self.up is not None and units.b is not None:
                linear = linear + units.b[:, 0, None] * self.up.weight
                constant = constant + units.b[:, 0] * self.up.bias
            return torch.cat([(down @ linear).T, (offset + down @ constant)[None]])
        extra = len(units.a) - down.shape[1]
        return torch.cat([down.T, down.new_zeros(extra, len(down)), offset[None]])


@dataclass(frozen=True)
class RoundedHidden:
    """A hidden vector whose maps are multiplied in bfloat16, about the inputs' mean: what is large and cancels, offsets
    and the means of preactivations, is no part of a product. Sink units and polynomials are computed as they were.

    Attributes:
        exact: the polynomial, float32.
        centre: (d,).
        gate, up: bfloat16 weights, and float32 biases of the maps of x − centre.
        pointing: the gate of the last units, those of sinks, in float32.
    """

    exact: HiddenPolynomial
    centre: Tensor
    gate: Affine
    up: Affine | None
    pointing: Affine

    @staticmethod
    def of(exact: HiddenPolynomial, centre: Tensor, sink_units: int) -> RoundedHidden:
        centre = centre.to(exact.gate.weight)

        def about(one: Affine) -> Affine:
            return Affine(one.weight.bfloat16(), one.bias + one.weight @ centre)

        up, units = None if exact.up is None else about(exact.up), len(exact.gate.bias)
        pointing = exact.gate.rows(torch.arange(units - sink_units, units, device=centre.device))
        return RoundedHidden(exact, centre, about(exact.gate), up, pointing)

    def __call__(self, x: Tensor) -> Tensor:
        return _vectors(x, self.exact.units, self._first)

    def _first(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        rounded = (x - self.centre).bfloat16()
        u, v = (
            None if one is None else torch.nn.functional.linear(rounded, one.weight).to(x.dtype).add_(one.bias)
            for one in (self.gate, self.up)
        )
        assert u is not None
        u[:, u.shape[1] - len(self.pointing.bias) :] = self.pointing(x)
        return u, v


def _vectors(x: Tensor, units: UnitPolynomials, first: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> Tensor:
    """(hidden vector, 1) of preactivations."""
    found = x.new_ones(len(x), len(units.a) + 1)
    some = CACHED if x.device.type == "cpu" else max(1, len(x))
    for rows, into in zip(x.split(some), found.split(some), strict=True):
        into[:, :-1] = units(*first(rows))
    return found
