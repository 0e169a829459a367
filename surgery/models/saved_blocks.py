"""Polynomial blocks as a twin stores them: one class for each kind of entry of `polynomial_blocks`.

What differs by kind stands in its class: which modules a block's input goes through, which tensors are matrices, how a
polynomial is written into the modules and read out of them. The modules themselves are in
:mod:`surgery.models.modeling_polynomial`, which travels with checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgery.blocks.find import survey
from surgery.blocks.parts import attribute
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine, balanced, bilinear
from surgery.errors import ModelError
from surgery.models import modeling_polynomial

PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class SavedBlock(ABC):
    """One entry, `entry`; `routed` where its module is called with routing beside its input."""

    entry: Mapping[str, Any]
    routed: ClassVar[bool] = False

    @property
    def path(self) -> str:
        return str(self.entry["path"])

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules that the block's input goes through, one after the other."""
        return (self.path,)

    @property
    @abstractmethod
    def readout(self) -> str:
        """What the names of its last map's parameters begin with."""

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices that may be an original's, but for a scale per row."""
        return ()

    def empty(self) -> dict[str, nn.Module]:
        """Its modules by path, on the meta device."""
        with torch.device("meta"):
            return modeling_polynomial.build(dict(self.entry))

    def built(self, polynomials: Sequence[BlockPolynomial], like: Tensor) -> dict[str, nn.Module]:
        """Its modules by path, with weights; dtype and device as `like`."""
        modules = {path: part.to_empty(device=like.device).to(like.dtype) for path, part in self.empty().items()}
        for module in modules.values():
            module.train(False)
        with torch.no_grad():
            self.write(modules, polynomials)
        return modules

    @abstractmethod
    def write(self, modules: Mapping[str, nn.Module], polynomials: Sequence[BlockPolynomial]) -> None:
        """Puts a polynomial (of experts, all of theirs) into the modules."""

    @abstractmethod
    def read(self, model: nn.Module) -> BlockPolynomial:
        """What the block computes in a model, float64. Raises ModelError where that is not one polynomial."""


class SavedAffine(SavedBlock):
    """One map in the block's place."""

    @property
    def readout(self) -> str:
        return f"{self.path}."

    def write(self, modules: Mapping[str, nn.Module], polynomials: Sequence[BlockPolynomial]) -> None:
        _fill(modules[self.paths[-1]], polynomials[0].as_affine())

    def read(self, model: nn.Module) -> BlockPolynomial:
        return BlockPolynomial.affine(_affine(model, self.paths[-1]))


class SavedPlain(SavedBlock):
    """Two maps and a polynomial activation between them, where the original had them."""

    @property
    def paths(self) -> tuple[str, ...]:
        return self.entry["first"], self.entry["activation"], self.entry["last"]

    @property
    def readout(self) -> str:
        return f"{self.entry['last']}."

    @property
    def matrices(self) -> tuple[str, ...]:
        return f"{self.entry['first']}.weight", f"{self.entry['last']}.weight"

    def write(self, modules: Mapping[str, nn.Module], polynomials: Sequence[BlockPolynomial]) -> None:
        first, activation, last = (_inside(modules, path) for path in self.paths)
        _fill(first, polynomials[0].gate)
        activation.coefficients.copy_(polynomials[0].a.T)
        _fill(last, polynomials[0].down)

    def read(self, model: nn.Module) -> BlockPolynomial:
        first, activation, last = self.paths
        a = attribute(model, activation).coefficients.detach().double().T
        return BlockPolynomial(_affine(model, first), None, a, None, _affine(model, last))


class SavedPlainAffine(SavedPlain, SavedAffine):
    """The last map alone; what stood before it passes its input on."""

    matrices = ()
    write = SavedAffine.write
    read = SavedAffine.read


class SavedGated(SavedBlock):
    """Gate, up and down with two polynomials a unit."""

    @property
    def readout(self) -> str:
        return f"{self.path}.down_proj."

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(f"{self.path}.{part}.weight" for part in PARTS)

    def write(self, modules: Mapping[str, nn.Module], polynomials: Sequence[BlockPolynomial]) -> None:
        module: Any = modules[self.path]
        found = polynomials[0]
        assert found.up is not None and found.b is not None
        module.coefficients.copy_(found.a.T)
        module.cross_coefficients.copy_(found.b.T)
        for part, affine in zip(PARTS, (found.gate, found.up, found.down), strict=True):
            _fill(module.get_submodule(part), affine)

    def read(self, model: nn.Module) -> BlockPolynomial:
        module = attribute(model, self.path)
        gate, up, down = (_affine(model, f"{self.path}.{part}") for part in PARTS)
        a, b = (value.detach().double().T for value in (module.coefficients, module.cross_coefficients))
        return BlockPolynomial(gate, up, a, b, down)


class SavedBilinear(SavedGated):
    """Gate ⊙ up, with biases and no activation: what a stock class may carry."""

    def write(self, modules: Mapping[str, nn.Module], polynomials: Sequence[BlockPolynomial]) -> None:
        found = polynomials[0]
        assert found.up is not None and found.b is not None
        form = bilinear(found.a, found.b, found.gate, found.up)
        down = Affine(found.down.weight, found.down.bias + found.down.weight @ form.remainder)
        for part, affine in zip(PARTS, balanced(form.gate, form.up, down), strict=True):
            _fill(modules[self.path].get_submodule(part), affine)

    def read(self, model: nn.Module) -> BlockPolynomial:
        gate, up, down = (_affine(model, f"{self.path}.{part}") for part in PARTS)
        h, product = len(gate.bias), gate.bias.new_tensor([0.0, 1.0])
        return BlockPolynomial(gate, up, gate.bias.new_zeros(h, 3), product.expand(h, 2), down)


class SavedExperts(SavedBlock):
    """All experts in one module; units that an expert has fewer of than the others stay zero."""

    routed = True

    @property
    def readout(self) -> str:
        return f"{self.path}.down_"

    def write(self, modules: Mapping[str, nn.Module], polynomials: Sequence[BlockPolynomial]) -> None:
        for number, found in enumerate(polynomials):
            last = found.as_affine() if found.degree == 1 else found.down
            values = {"down_weight": last.weight, "down_bias": last.bias}
            if found.degree > 1:
                values |= {"gate_weight": found.gate.weight, "gate_bias": found.gate.bias, "coefficients": found.a.T}
            if found.up is not None and found.b is not None:
                values |= {"up_weight": found.up.weight, "up_bias": found.up.bias, "cross_coefficients": found.b.T}
            for name, value in values.items():
                place = getattr(modules[self.path], name)[number].zero_()
                place[tuple(slice(0, size) for size in value.shape)] = value.to(place)

    def read(self, model: nn.Module) -> BlockPolynomial:
        raise ModelError("a mixture of experts is not one polynomial", where=self.path)

    def read_expert(self, model: nn.Module, number: int) -> BlockPolynomial:
        """What one expert computes, float64."""
        module: Any = attribute(model, self.path)

        def stored(name: str) -> Tensor:
            found: Tensor = getattr(module, name)[number].detach().double()
            return found

        down = Affine(stored("down_weight"), stored("down_bias"))
        if module.degree == 1:
            return BlockPolynomial.affine(down)
        gate, a = Affine(stored("gate_weight"), stored("gate_bias")), stored("coefficients").T
        if not module.gated:
            return BlockPolynomial(gate, None, a, None, down)
        up = Affine(stored("up_weight"), stored("up_bias"))
        return BlockPolynomial(gate, up, a, stored("cross_coefficients").T, down)

    def routed_to(self, model: nn.Module, number: int, x: Tensor, index: Tensor | None = None, *_: Any) -> Tensor:
        """The inputs of one expert among the arguments of the module's call, (tokens, d): NaN where a token goes
        elsewhere."""
        module: Any = attribute(model, self.path)
        if index is None:  # the inputs are there once for each expert, zero where a token goes elsewhere
            own = x.reshape(module.number, -1, x.shape[-1])[number]
            here = own.any(-1)
        else:
            own = x.reshape(-1, x.shape[-1])
            here = index[..., number].any(-1).flatten() if index.dim() == 3 else (index == number).any(-1).flatten()
        return own.masked_fill(~here[:, None], torch.nan)


KINDS: dict[str, type[SavedBlock]] = {
    "affine": SavedAffine,
    "plain_affine": SavedPlainAffine,
    "plain": SavedPlain,
    "gated": SavedGated,
    "bilinear": SavedBilinear,
    "experts": SavedExperts,
}


def saved_block(entry: Mapping[str, Any]) -> SavedBlock:
    """The entry as what it describes. Raises ModelError for a kind that this version does not know."""
    if entry["kind"] not in KINDS:
        raise ModelError(f"unknown kind of polynomial block {entry['kind']!r}", where=entry["path"])
    return KINDS[entry["kind"]](entry)


def saved_blocks(model: Any) -> list[SavedBlock]:
    """Of a twin with custom code; none of any other model."""
    return [saved_block(entry) for entry in getattr(model.config, "polynomial_blocks", None) or ()]


def twin_blocks(model: Any) -> list[SavedBlock]:
    """A twin's polynomial blocks; of a native one, as it would describe them."""
    if getattr(model.config, "model_type", None) == modeling_polynomial.MODEL_TYPE:
        return saved_blocks(model)
    loaded = {b.path for b in survey(model).blocks if b.takes_native_form and b.activation == "linear"}
    return [
        saved_block({"path": path, "kind": "bilinear", "degree": 2})
        for path, module in model.named_modules()
        if path in loaded or isinstance(module, modeling_polynomial.BilinearGLU)  # the latter just after its conversion
    ]


def _inside(modules: Mapping[str, nn.Module], path: str) -> Any:
    """The module at a path that may lie within one of `modules`."""
    root = next(root for root in modules if f"{path}.".startswith(f"{root}."))
    return modules[root].get_submodule(path[len(root) + 1 :])


def _fill(module: nn.Module, affine: Affine) -> None:
    module.weight.copy_(affine.weight)  # type: ignore[operator]
    module.bias.copy_(affine.bias)  # type: ignore[operator]


def _affine(model: nn.Module, path: str) -> Affine:
    module = attribute(model, path)
    weight = module.weight.detach().double()
    return Affine(weight, weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double())
