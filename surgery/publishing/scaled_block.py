"""A quadratic block whose every number lies in [−1, 1] on calibrated inputs, as encrypted arithmetic wants it.

    y = D (g ⊙ u) + d,    g = G x + g₀,    u = U x + u₀

Each coordinate of x, g, u and y is divided by the largest absolute value that calibration saw of it, and the maps
absorb that. Three multiplications follow each other: by G and U, of g by u, and by D.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine, bilinear
from surgery.errors import ModelError
from surgery.models.saved_blocks import SavedBlock
from surgery.runtime.hooks import hooked

DEPTH = 3
FEWEST = 1e-12  # of a coordinate that is always 0


@dataclass(frozen=True)
class Product:
    """y = down(gate(x) ⊙ up(x)), float64."""

    gate: Affine
    up: Affine
    down: Affine

    @staticmethod
    def of(polynomial: BlockPolynomial, path: str) -> Product:
        """Of a block of degree 2, gated or plain. Raises ModelError for another degree."""
        if polynomial.degree != 2:
            raise ModelError(
                f"a block of degree {polynomial.degree} has no form of three multiplications here",
                where=path,
                fix="convert with --degree 2",
            )
        up = polynomial.up or Affine(torch.zeros_like(polynomial.gate.weight), torch.zeros_like(polynomial.gate.bias))
        b = polynomial.a.new_zeros(len(polynomial.a), 2) if polynomial.b is None else polynomial.b
        form = bilinear(polynomial.a.double(), b.double(), polynomial.gate.to(torch.float64), up.to(torch.float64))
        down = polynomial.down.to(torch.float64)
        return Product(form.gate, form.up, Affine(down.weight, down.bias + down.weight @ form.remainder))

    def to(self, dtype: torch.dtype) -> Product:
        return Product(self.gate.to(dtype), self.up.to(dtype), self.down.to(dtype))

    def stages(self, x: Tensor) -> Ranges:
        """Input, both factors and output at each token, (tokens, …) each."""
        gate, up = self.gate(x), self.up(x)
        return Ranges(x, gate, up, self.down(gate * up))


@dataclass(frozen=True)
class Ranges:
    """Numbers of a block's four stages: its input (…, d), both factors (…, h) and its output (…, out)."""

    x: Tensor
    gate: Tensor
    up: Tensor
    y: Tensor

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class ScaledBlock:
    """y ÷ y_size = down(gate(x ÷ x_size) ⊙ up(x ÷ x_size)), every coordinate in [−1, 1] on calibrated inputs.

    Attributes:
        gate, up, down: affine maps, float64.
        x_size, y_size: what inputs are divided and outputs multiplied by, (d,) and (out,).
    """

    gate: Affine
    up: Affine
    down: Affine
    x_size: Tensor
    y_size: Tensor

    @staticmethod
    def of(product: Product, largest: Ranges) -> ScaledBlock:
        """Args: largest: absolute value of each coordinate on calibrated inputs."""
        x, g, u, y = (part.double().clamp_min(FEWEST) for _, part in largest.parts())
        gate = Affine(product.gate.weight * x / g[:, None], product.gate.bias / g)
        up = Affine(product.up.weight * x / u[:, None], product.up.bias / u)
        down = Affine(product.down.weight * (g * u) / y[:, None], product.down.bias / y)
        return ScaledBlock(gate, up, down, x, y)

    def __call__(self, x: Tensor) -> Tensor:
        """The block's own output for its own inputs, unencrypted, (tokens, d) to (tokens, out)."""
        scaled = x.double() / self.x_size
        return self.down(self.gate(scaled) * self.up(scaled)) * self.y_size

    def homogeneous(self) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down as matrices of (x, 1) and of (gate ⊙ up, 1): the biases are their last columns.

        gate and up have one more row, which is 1, so that their product is; down has not.
        """
        last = torch.zeros(1, self.gate.weight.shape[1] + 1, dtype=torch.float64)
        last[0, -1] = 1
        gate, up, down = (torch.cat([one.weight, one.bias[:, None]], dim=1) for one in (self.gate, self.up, self.down))
        return torch.cat([gate, last]), torch.cat([up, last]), down

    def tensors(self, path: str) -> dict[str, Tensor]:
        """By name, float32, as they are stored."""
        maps = {"gate": self.gate, "up": self.up, "down": self.down}
        named = {f"{name}.weight": one.weight for name, one in maps.items()}
        named |= {f"{name}.bias": one.bias for name, one in maps.items()}
        named |= {"x_size": self.x_size, "y_size": self.y_size}
        return {f"{path}.{name}": value.float().contiguous() for name, value in named.items()}

    @staticmethod
    def read(tensors: Mapping[str, Tensor], path: str) -> ScaledBlock:
        """From what :meth:`tensors` gave. Raises ModelError where the path has none."""
        if f"{path}.gate.weight" not in tensors:
            known = sorted({name.removesuffix(".gate.weight") for name in tensors if name.endswith(".gate.weight")})
            raise ModelError(f"no block {path!r}", fix=f"one of {', '.join(known)}")
        gate, up, down = (
            Affine(tensors[f"{path}.{name}.weight"].double(), tensors[f"{path}.{name}.bias"].double())
            for name in ("gate", "up", "down")
        )
        return ScaledBlock(gate, up, down, tensors[f"{path}.x_size"].double(), tensors[f"{path}.y_size"].double())


@contextmanager
def entering(model: Any, blocks: Sequence[SavedBlock], take: Any) -> Iterator[None]:
    """Inside, `take(path, x)` is called with every block's input, (tokens, d)."""

    def noting(path: str) -> Any:
        return lambda _, inputs: take(path, inputs[0].detach().flatten(0, -2))

    handles = [model.get_submodule(block.paths[0]).register_forward_pre_hook(noting(block.path)) for block in blocks]
    with hooked(handles), torch.no_grad():
        yield


def largest_values(
    model: Any, blocks: Sequence[SavedBlock], products: Mapping[str, Product], batches: Iterable[Tensor]
) -> dict[str, Ranges]:
    """Each coordinate's largest absolute value over all tokens, by block."""
    found: dict[str, Ranges] = {}
    products = {path: product.to(model.dtype) for path, product in products.items()}

    def take(path: str, x: Tensor) -> None:
        here = [part.abs().amax(0) for _, part in products[path].stages(x).parts()]
        if path in found:
            here = [torch.maximum(old, new) for (_, old), new in zip(found[path].parts(), here, strict=True)]
        found[path] = Ranges(*here)

    with entering(model, blocks, take):
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    return found


@dataclass(frozen=True)
class Excess:
    """How real inputs leave the calibrated range.

    Attributes:
        largest: of any coordinate of any stage, in units of its range.
        values_out: share of the factors' values beyond their range.
        tokens_out: share of the tokens with such a value.
    """

    largest: float
    values_out: float
    tokens_out: float


def excess(
    model: Any,
    blocks: Sequence[SavedBlock],
    products: Mapping[str, Product],
    ranges: Mapping[str, Ranges],
    batches: Iterable[Tensor],
) -> dict[str, Excess]:
    """Of text on which nothing was calibrated, by block."""
    products = {path: product.to(model.dtype) for path, product in products.items()}
    largest = dict.fromkeys(products, 0.0)
    values, tokens, count = dict.fromkeys(products, 0), dict.fromkeys(products, 0), dict.fromkeys(products, 0)

    def take(path: str, x: Tensor) -> None:
        stages = zip(products[path].stages(x).parts(), ranges[path].parts(), strict=True)
        share = {name: part.abs() / limit.clamp_min(FEWEST) for (name, part), (_, limit) in stages}
        out = torch.cat([share["gate"], share["up"]], dim=-1) > 1
        largest[path] = max(largest[path], *(float(part.max()) for part in share.values()))
        values[path] += int(out.sum())
        tokens[path] += int(out.any(-1).sum())
        count[path] += len(x)

    with entering(model, blocks, take):
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    units = {path: 2 * len(product.gate.bias) for path, product in products.items()}
    return {
        path: Excess(largest[path], values[path] / (count[path] * units[path]), tokens[path] / count[path])
        for path in products
    }
