"""A feed-forward block of a transformer: one class for each kind.

    gated     σ(gate x) ⊙ (up x) → down       three matrices in one module
    fused     the same, gate and up in one matrix
    plain     σ(first x) → last                two matrices, in one module, inline in a layer, or in two parts of it
    half      a plain one, where one module is σ(first x)
    experts   many of these in one module, see :mod:`surgery.blocks.experts`

What differs by kind stands in its class: where the parts are, which weights it has, how a call of it is recomputed,
what conversion puts in its place, and how that is described in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgery.blocks import experts
from surgery.blocks.parts import attribute, weight_and_bias
from surgery.blocks.residual import Residual
from surgery.blocks.weights import BlockWeights, Map
from surgery.closed_form.activations import ACTIVATIONS, Activation, recognise
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.errors import CalibrationError, ModelError

TOLERANCE = 1e-3  # relative; a wrong reading of a block is off by the size of its output


@dataclass(frozen=True)
class Call:
    """One call of a block: (input, output) of each of its modules, by path; and where its tokens go."""

    seen: Mapping[str, tuple[Tensor, Tensor]]
    routing: experts.Routing | None = None


@dataclass(frozen=True)
class Block:
    """One feed-forward block.

    Attributes:
        kind: gated, fused, plain or experts; unlike: what it is called, and what may go on inside it, where
            recomputing it gives something else; whole: one module is the block, so that it can be answered for at its
            entrance; routed: it takes routing beside its input; takes_native_form: a stock class may carry its
            bilinear form.
        path: the module a user would name: the block's own module, or the layer that holds it inline.
        first: paths of the map(s) that read the block's input; gate before up. None of experts.
        last: path of the map that writes its output; of experts, the module itself.
        activation_path: where the activation sits; empty where it is called as a function.
        activation: its name.
        width, hidden, out: d, h, o.
        parameters: number of weights and biases.
        experts: how many; 1 for an ordinary block.
        residual: how the block's output joins the residual stream, seen in a forward pass; None where not known.
        calls: how often it runs in one forward pass, seen in one; more than once where layers share their weights.
    """

    kind: ClassVar[str]
    unlike: ClassVar[tuple[str, str]]
    whole: ClassVar[bool] = True
    routed: ClassVar[bool] = False
    takes_native_form: ClassVar[bool] = False

    path: str
    first: tuple[str, ...]
    last: str
    activation_path: str
    activation: str
    width: int
    hidden: int
    out: int
    parameters: int
    experts: int = 1
    residual: Residual | None = None
    calls: int = 1

    @property
    def entry(self) -> str:
        """Path of the module that receives the block's input."""
        return self.path

    @property
    def exit(self) -> str:
        """Path of the module that writes the block's output."""
        return self.path

    @property
    def replaced_paths(self) -> tuple[str, ...]:
        """Paths at which conversion puts something new."""
        return (self.path,)

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of all that says what it computes and what becomes of it."""
        norm = "" if self.residual is None else self.residual.norm
        return tuple(path for path in (*self.first, self.last, self.activation_path, norm) if path)

    def as_dict(self) -> dict[str, Any]:
        """Its row in `surgery inspect --json`: the same keys whatever its kind."""
        values = {"half": "", **asdict(self)}
        values.pop("passes", None)
        return {"path": values.pop("path"), "kind": self.kind, **values}

    def coefficients(self, degree: int) -> int:
        """How many a unit's polynomial of this total degree has: of u^k, k ≤ n, and v u^k, k < n."""
        return 2 * degree + 1

    def modules(self, model: nn.Module) -> dict[str, Any]:
        """Its maps, its activation and the norm that its output passes through, by path."""
        return {path: attribute(model, path) for path in self.parts}

    def maps(self, modules: Mapping[str, Any]) -> tuple[Map, Map | None]:
        """Gate and up, or the only one and None."""
        gate, up = (weight_and_bias(modules[path]) for path in self.first)
        return gate, up

    def matrices(self) -> list[tuple[str, list[int] | None]]:
        """Its matrices: name of the tensor, and which rows of it, None for all."""
        return [(f"{path}.weight", None) for path in (*self.first, self.last)]

    def nonlinearity(self, function: Callable[[Tensor], Tensor] | None) -> Activation:
        """What the activation at its path is. Raises ModelError if it is not an elementwise function."""
        found = ACTIVATIONS.get(self.activation) if function is None else recognise(function, self.activation)
        if found is None:
            raise ModelError(
                "the activation is not an elementwise function",
                where=self.activation_path,
                fix="leave this block out with --blocks",
            )
        return found

    def weights(self, modules: Mapping[str, Any]) -> BlockWeights:
        """Its weights, of the modules at its paths. Raises CalibrationError where they are not finite."""
        activation = self.nonlinearity(modules.get(self.activation_path))
        found = BlockWeights(activation, *self.maps(modules), weight_and_bias(modules[self.last]))
        if not found.finite():
            raise CalibrationError("the weights hold NaN or infinite values", where=self.path)
        return found

    def function(self, model: nn.Module) -> Callable[..., Tensor]:
        """x ↦ what stands at its place in `model` computes, original or polynomial; experts need their routing too."""
        found: Callable[..., Tensor] = attribute(model, self.path)
        return found

    def recomputed(self, model: nn.Module, call: Call) -> Block | None:
        """The block, if its weights make of one call's input what the call gave; else None.

        Gate and up come exchanged where that is what the module does, and an activation that no module holds is found.
        """
        entered, written = call.seen[self.entry]
        if any(not torch.equal(call.seen[path][0].flatten(), entered.flatten()) for path in self.first):
            return None
        if self.whole and not near(written, call.seen[self.last][1]):
            return None
        known = [self.nonlinearity(attribute(model, self.activation_path))] if self.activation_path else ()
        for activation in known or ACTIVATIONS.values():
            hidden = self.hidden_values(activation, [call.seen[path][1] for path in self.first])
            for first, value in hidden.items():
                if near(value, call.seen[self.last][0]):
                    return replace(self, first=first, activation=activation.name)
        return None

    def hidden_values(self, activation: Activation, parts: Sequence[Tensor]) -> dict[tuple[str, ...], Tensor]:
        """What the hidden vector may be, given what the first maps write; by the order of their paths."""
        raise NotImplementedError  # a mixture has no such maps, and is recomputed as a whole

    def saved_entry(self, polynomials: Sequence[BlockPolynomial], form: str) -> dict[str, Any]:
        """The entry of `polynomial_blocks` that rebuilds the modules of its polynomial, in the twin's form."""
        degree = polynomials[0].degree
        hidden = 0 if degree == 1 else max(len(one.gate.bias) for one in polynomials)
        sizes = {"width": self.width, "hidden": hidden, "out": self.out}
        return {"path": self.path, "kind": self.saved_kind(degree, form), "degree": degree, **sizes}

    def saved_kind(self, degree: int, form: str) -> str:
        """Its polynomial's kind in `polynomial_blocks`."""
        if degree == 1:
            return "affine"
        return "bilinear" if form == "native" else "gated"


@dataclass(frozen=True)
class GatedBlock(Block):
    """Gate, up and down in one module."""

    kind = "gated"
    unlike = "gated block", "clamping, a norm, another order of gate and up"
    takes_native_form = True

    def hidden_values(self, activation: Activation, parts: Sequence[Tensor]) -> dict[tuple[str, ...], Tensor]:
        one, two = parts
        return {self.first: activation.function(one) * two, self.first[::-1]: activation.function(two) * one}


@dataclass(frozen=True)
class FusedBlock(Block):
    """Gate and up below each other in one matrix."""

    kind = "fused"
    unlike = "fused block", "clamping, a norm, another order of gate and up"

    def maps(self, modules: Mapping[str, Any]) -> tuple[Map, Map | None]:
        weight, bias = weight_and_bias(modules[self.first[0]])
        gate, up = weight.chunk(2)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return (gate, gate_bias), (up, up_bias)

    def matrices(self) -> list[tuple[str, list[int] | None]]:
        name, h = f"{self.first[0]}.weight", self.hidden
        return [(name, [0, h]), (name, [h, 2 * h]), (f"{self.last}.weight", None)]

    def hidden_values(self, activation: Activation, parts: Sequence[Tensor]) -> dict[tuple[str, ...], Tensor]:
        gate, up = parts[0].chunk(2, dim=-1)
        return {self.first: activation.function(gate) * up}


@dataclass(frozen=True)
class PlainBlock(Block):
    """Two maps and an activation between them; each is replaced where it stands."""

    kind = "plain"
    unlike = "plain block", "clamping, a norm, another activation"
    whole = False

    @property
    def entry(self) -> str:
        return self.first[0]

    @property
    def exit(self) -> str:
        return self.last

    @property
    def replaced_paths(self) -> tuple[str, ...]:
        return (*self.first, self.activation_path, self.last)

    def coefficients(self, degree: int) -> int:
        return degree + 1

    def maps(self, modules: Mapping[str, Any]) -> tuple[Map, Map | None]:
        return weight_and_bias(modules[self.first[0]]), None

    def function(self, model: nn.Module) -> Callable[..., Tensor]:
        parts = [attribute(model, path) for path in self.replaced_paths]

        def run(x: Tensor) -> Tensor:
            for part in parts:
                x = part(x)
            return x

        return run

    def hidden_values(self, activation: Activation, parts: Sequence[Tensor]) -> dict[tuple[str, ...], Tensor]:
        return {self.first: activation.function(parts[0])}

    def saved_kind(self, degree: int, form: str) -> str:
        return "plain_affine" if degree == 1 else "plain"

    def saved_entry(self, polynomials: Sequence[BlockPolynomial], form: str) -> dict[str, Any]:
        parts = {"first": self.first[0], "activation": self.activation_path, "last": self.last}
        return super().saved_entry(polynomials, form) | parts


@dataclass(frozen=True)
class HalfBlock(PlainBlock):
    """A plain block whose activation is called as a function: `half` is the module that is σ(first x) (ESM)."""

    half: str = ""

    @property
    def entry(self) -> str:
        return self.half

    @property
    def replaced_paths(self) -> tuple[str, ...]:
        return self.half, self.last

    def saved_entry(self, polynomials: Sequence[BlockPolynomial], form: str) -> dict[str, Any]:
        found = super().saved_entry(polynomials, form)
        if found["degree"] == 1:
            return found | {"first": self.half, "activation": self.half}
        return found | {"half": self.half, "first": f"{self.half}.dense", "activation": f"{self.half}.activation"}


@dataclass(frozen=True)
class ExpertsBlock(Block):
    """All experts of a mixture, in one module that is called with the routing; `passes` as in `experts.passes`."""

    kind = "experts"
    unlike = "experts", "routing weights used in another way"
    routed = True

    passes: bool = False

    def recomputed(self, model: nn.Module, call: Call) -> Block | None:
        module = model.get_submodule(self.path)
        x, output = (experts.folded(module, value) for value in call.seen[self.path])
        assert call.routing is not None
        return self if near(experts.recomputed(module, x.flatten(0, -2), call.routing), output) else None

    def weights(self, modules: Mapping[str, Any]) -> BlockWeights:
        raise ModelError("a mixture of experts has several functions, one an expert", where=self.path)

    def one(self, number: int) -> GatedBlock:
        """An expert as if it were a block of its own."""
        path = f"{self.path}.{number}"
        sizes = (self.width, self.hidden, self.out, self.parameters // self.experts)
        return GatedBlock(path, (), path, "", self.activation, *sizes)

    def saved_kind(self, degree: int, form: str) -> str:
        return "experts"

    def saved_entry(self, polynomials: Sequence[BlockPolynomial], form: str) -> dict[str, Any]:
        found = super().saved_entry(polynomials, form)
        found |= {"experts": len(polynomials), "gated": any(one.up is not None for one in polynomials)}
        return found | ({"passes": True} if self.passes else {})


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two values of a block are one, but for the order of rounding."""
    tolerance = max(TOLERANCE, 4 * torch.finfo(b.dtype).eps)  # in bfloat16 another order of rounding is off by more
    a, b = a.float().flatten(), b.float().flatten()
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm() + 1e-30)
