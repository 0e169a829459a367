"""A block's hidden vector, as the original computes it and as its polynomial does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery import experts
from surgery.activations import Activation
from surgery.blocks import Block, activation_of, weight_and_bias
from surgery.errors import CalibrationError
from surgery.lstsq import UnitPolynomials
from surgery.polynomial import Affine


@dataclass(frozen=True)
class Original:
    """The block's weights, whatever modules hold them."""

    activation: Activation
    gate: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None] | None
    down: tuple[Tensor, Tensor | None]

    @staticmethod
    def of(block: Block, modules: Mapping[str, Any]) -> Original:
        first = [weight_and_bias(modules[path]) for path in block.first]
        if block.kind == "fused":
            weight, bias = first[0]
            halves = weight.chunk(2, dim=0)
            biases = (None, None) if bias is None else bias.chunk(2, dim=0)
            first = [(halves[0], biases[0]), (halves[1], biases[1])]
        up = first[1] if len(first) == 2 else None
        down = weight_and_bias(modules[block.last])
        for weight, bias in (*first, down):
            if not bool(torch.isfinite(weight).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
                raise CalibrationError("the weights hold NaN or infinite values", where=block.path)
        return Original(activation_of(modules.get(block.activation_path), block), first[0], up, down)

    @staticmethod
    def of_expert(module: Any, number: int) -> Original:
        """One expert of a module that :mod:`surgery.experts` can read."""
        gate, up, down = experts.weights(module, number)
        return Original(experts.unit(module), gate, up, down)

    def preactivations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = nn.functional.linear(x, *self.gate)
        return y, None if self.up is None else nn.functional.linear(x, *self.up)

    def hidden(self, y: Tensor, z: Tensor | None) -> Tensor:
        return self.activation.unit(y, z)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.hidden(*self.preactivations(x)), *self.down)


class Features:
    """x ↦ (hidden vector of the polynomial, 1); for degree 1, (x, 1)."""

    def __init__(
        self, gate: Affine, up: Affine | None, units: UnitPolynomials, degree: int, dtype: torch.dtype
    ) -> None:
        self.degree = degree
        self.gate = (gate.weight.to(dtype), gate.bias.to(dtype))
        self.up = None if up is None else (up.weight.to(dtype), up.bias.to(dtype))
        b = None if units.b is None else units.b.to(dtype)
        self.units = UnitPolynomials(units.a.to(dtype), b, units.r2, units.condition)

    def __call__(self, x: Tensor) -> Tensor:
        if self.degree == 1:
            return torch.cat([x, x.new_ones(len(x), 1)], dim=-1)
        u = nn.functional.linear(x, *self.gate)
        hidden = self.units(u, None if self.up is None else nn.functional.linear(x, *self.up))
        return torch.cat([hidden, hidden.new_ones(len(x), 1)], dim=-1)


def with_sink_units(
    gate: Affine, up: Affine | None, units: UnitPolynomials, pointing: Affine
) -> tuple[Affine, Affine | None, UnitPolynomials]:
    extra = len(pointing.bias)
    if not extra:
        return gate, up, units
    gate = Affine(torch.cat([gate.weight, pointing.weight]), torch.cat([gate.bias, pointing.bias]))
    if up is not None:
        up = Affine(
            torch.cat([up.weight, torch.zeros_like(pointing.weight)]),
            torch.cat([up.bias, torch.zeros_like(pointing.bias)]),
        )
    squares = units.a.new_zeros(extra, units.a.shape[1])
    squares[:, 2] = 1
    a = torch.cat([units.a, squares])
    b = None if units.b is None else torch.cat([units.b, units.b.new_zeros(extra, units.b.shape[1])])
    r2 = torch.cat([units.r2, units.r2.new_ones(extra)])
    return gate, up, UnitPolynomials(a, b, r2, units.condition, units.error)


def only(
    kept: Tensor, gate: Affine, up: Affine | None, units: UnitPolynomials
) -> tuple[Affine, Affine | None, UnitPolynomials]:
    """The units with these numbers."""
    gate = Affine(gate.weight[kept], gate.bias[kept])
    up = None if up is None else Affine(up.weight[kept], up.bias[kept])
    b = None if units.b is None else units.b[kept]
    return gate, up, UnitPolynomials(units.a[kept], b, units.r2[kept], units.condition, units.error)


def prior_readout(original: Original, units: UnitPolynomials, gate: Affine, up: Affine | None, degree: int) -> Tensor:
    """The original readout on the features, (p, out) float64; sink units and, for degree 1, units folded in."""
    weight, bias = original.down
    down = weight.double()
    offset = down.new_zeros(len(down)) if bias is None else bias.double()
    if degree == 1:
        linear = units.a[:, 1, None] * gate.weight
        constant = units.a[:, 0] + units.a[:, 1] * gate.bias
        if up is not None and units.b is not None:
            linear = linear + units.b[:, 0, None] * up.weight
            constant = constant + units.b[:, 0] * up.bias
        return torch.cat([(down @ linear).T, (offset + down @ constant)[None]])
    extra = len(units.a) - down.shape[1]
    return torch.cat([down.T, down.new_zeros(extra, len(down)), offset[None]])
