"""Mixtures of experts that one module holds.

Such a module is called with (hidden states (tokens, d), expert numbers (tokens, k), routing weights (tokens, k)). Each
expert is an ordinary feed-forward block for the tokens routed to it,

    y_t = Σ_j w_tj · f_{e_tj}(x_t),

and is replaced by its own polynomial. Llama 4 weighs the inputs instead and repeats them: its module is called with
(experts · tokens, d), rows that are zero where a token goes elsewhere, and returns as many.

How the weights are kept is the layout: tensors with a first dimension of experts (most), matrices with all experts
below each other (DBRX), or a module for each (Switch Transformers, NLLB-MoE). A unit need not be σ(gate)·up: what the
module itself does with its gate and up (GPT-OSS clamps both and takes up + 1) is a function of the two, and is fitted
as one. What is read here is believed only once it was recomputed (:mod:`surgery.blocks.verify`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from surgery.blocks.weights import BlockWeights, Map
from surgery.closed_form.activations import Activation, recognise
from surgery.errors import ModelError


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to: numbers and weights, both (tokens, k). Numbers past the last mean none."""

    index: Tensor
    weight: Tensor

    @staticmethod
    def of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing:
        """From the arguments the module was called with, hidden states included.

        Raises:
            ModelError: repeated inputs of more than one expert a token, which cannot be told from each other.
        """
        if repeats(module):
            used = args[0].view(count(module), -1, args[0].shape[-1]).any(-1)
            if int(used.sum(0).max()) > 1:
                raise ModelError(
                    "several experts a token, with their weights in the inputs, cannot be told apart",
                    fix="leave these blocks out with --blocks",
                )
            index = torch.where(used.any(0), used.int().argmax(0), len(used))[:, None]
            return Routing(index, args[0].new_ones(index.shape))
        bound = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
        given = [value for value in bound if isinstance(value, Tensor)][1:3]
        index, weight = given if not given[0].is_floating_point() else given[::-1]
        if index.dim() == 3:  # one-hot, with all zero for none
            index = torch.where(index.any(-1), index.argmax(-1), index.shape[-1])
        return Routing(index, weight)

    def of_expert(self, number: int) -> tuple[Tensor, Tensor]:
        """Token numbers routed to an expert, and their weights."""
        token, place = torch.where(self.index == number)
        return token, self.weight[token, place]


class Layout(Protocol):
    """How a module keeps its experts' weights."""

    def why_not(self, module: Any) -> str | None:
        """Why it cannot be read after all."""

    def count(self, module: Any) -> int: ...

    def weights(self, module: Any, number: int) -> tuple[Map, Map | None, Map]:
        """Of one expert: gate, up (None where it has no gate) and down."""

    def unit(self, module: Any) -> Activation:
        """What an expert does between its maps. Raises ValueError where that is no elementwise function."""


class _Stacked:
    """Tensors whose first dimension is the expert, as transformers 5 keeps them; its flags say what is in them."""

    def why_not(self, module: Any) -> str | None:
        if len(inspect.signature(module.forward).parameters) == 2:  # weights of all experts, and no numbers (Inkling)
            return "mixture of experts in a form that is not known"
        if getattr(module, "has_post_expert_norm", False):
            return "mixture of experts with a norm after each expert, which is not a polynomial"
        return None

    def count(self, module: Any) -> int:
        return int(module.down_proj.shape[0])

    def weights(self, module: Any, number: int) -> tuple[Map, Map | None, Map]:
        first = getattr(module, "gate_up_proj", None)
        transposed = first is not None and first.shape[2] == 2 * module.down_proj.shape[1]
        transposed, together = getattr(module, "is_transposed", transposed), getattr(module, "is_concatenated", True)

        def one(name: str) -> Map:
            weight = getattr(module, name)[number]
            bias = getattr(module, f"{name}_bias", None)
            return (weight.T if transposed else weight), (None if bias is None else bias[number])

        down = one("down_proj")
        if first is None:
            return one("up_proj"), None, down
        weight, bias = one("gate_up_proj")
        half = len(weight) // 2
        gate = slice(None, half) if together else slice(None, None, 2)
        up = slice(half, None) if together else slice(1, None, 2)
        biases = (None, None) if bias is None else (bias[gate], bias[up])
        return (weight[gate], biases[0]), (weight[up], biases[1]), down

    def unit(self, module: Any) -> Activation:
        """σ(y), σ(y)·z, or the module's own function of y and z."""
        own, together = getattr(module, "_apply_gate", None), getattr(module, "is_concatenated", True)
        if own is None or own.__func__.__name__ == "_default_apply_gate" or not getattr(module, "has_gate", True):
            return _elementwise(module.act_fn)

        def joint(y: Tensor, z: Tensor) -> Tensor:
            both = torch.cat([y, z], dim=-1) if together else torch.stack([y, z], dim=-1).flatten(-2)
            result: Tensor = own(both)
            return result

        return Activation("the experts' own gate", nn.functional.silu, joint=joint)


class _Matrices:
    """Gate, up and transposed down of all experts below each other in three matrices (DBRX)."""

    def why_not(self, module: Any) -> str | None:
        return None

    def count(self, module: Any) -> int:
        return int(module.mlp.moe_num_experts)

    def weights(self, module: Any, number: int) -> tuple[Map, Map | None, Map]:
        gate, up, down = (
            part.chunk(self.count(module))[number] for part in (module.mlp.w1, module.mlp.v1, module.mlp.w2)
        )
        return (gate, None), (up, None), (down.T, None)

    def unit(self, module: Any) -> Activation:
        return _elementwise(module.mlp.activation_fn)


class _Listed:
    """A module for each expert: two linear maps and an activation (Switch Transformers, NLLB-MoE)."""

    def why_not(self, module: Any) -> str | None:
        return None

    def count(self, module: Any) -> int:
        return len(_parts(module))

    def weights(self, module: Any, number: int) -> tuple[Map, Map | None, Map]:
        first, last = _linears(_parts(module)[number])
        scale = 1 - getattr(module, "moe_token_dropout", 0.0)  # NLLB-MoE multiplies by it when it does not train
        bias = None if last.bias is None else last.bias * scale
        return (first.weight, first.bias), None, (last.weight * scale, bias)

    def unit(self, module: Any) -> Activation:
        return _elementwise(_parts(module)[0].act)


def layout(module: nn.Module) -> Layout | None:
    """How a module keeps its experts, None if it holds none. Works on meta weights."""
    own = dict(module.named_parameters(recurse=False))
    if "down_proj" in own and own["down_proj"].dim() == 3:
        return _Stacked()
    if all(hasattr(getattr(module, "mlp", None), name) for name in ("w1", "v1", "w2", "moe_num_experts")):
        return _Matrices()
    parts = _parts(module) if isinstance(module, nn.ModuleDict) else []
    if len(parts) > 1 and all(len(_linears(part)) == 2 and hasattr(part, "act") for part in parts):
        return _Listed()
    return None


def why_not(module: nn.Module) -> str | None:
    """Why a module that holds experts cannot be read, or None if it can."""
    return _layout(module).why_not(module)


def count(module: Any) -> int:
    """How many experts it holds."""
    return _layout(module).count(module)


def widths(module: Any) -> tuple[int, int, int]:
    """d, h, o of one expert."""
    (gate, _), _, (down, _) = _layout(module).weights(module, 0)
    return gate.shape[1], gate.shape[0], down.shape[0]


def weights(module: Any, number: int) -> BlockWeights:
    """One expert's. Raises ValueError where its activation is no elementwise function."""
    return BlockWeights(unit(module), *_layout(module).weights(module, number))


def recomputed(module: Any, x: Tensor, routing: Routing) -> Tensor:
    """What a module of experts computes of (tokens, d), from the weights found."""
    total = x.new_zeros(len(x), widths(module)[2])
    for number in range(count(module)):
        rows, weight = routing.of_expert(number)
        if len(rows):
            total.index_add_(0, rows, (weights(module, number)(x[rows]) * weight[:, None]).to(total.dtype))
    if passes(module):
        rows, place = torch.where(routing.index >= count(module))
        total.index_add_(0, rows, (x[rows] * routing.weight[rows, place, None]).to(total.dtype))
    return total


def unit(module: Any) -> Activation:
    """What an expert does between its maps. Raises ValueError where that is no elementwise function."""
    return _layout(module).unit(module)


def repeats(module: Any) -> bool:
    """Whether it takes the inputs once for each expert (Llama 4)."""
    return len(inspect.signature(module.forward).parameters) == 1


def folded(module: Any, value: Tensor) -> Tensor:
    """Inputs or outputs of a module that repeats them, once: (tokens, d). Others' as they are."""
    return value.view(count(module), -1, value.shape[-1]).sum(0) if repeats(module) else value


def passes(module: Any) -> bool:
    """Whether numbers past the last expert's give a token back as it is, times its weight (LongCat's zero experts)."""
    return bool(getattr(module, "zero_expert_num", 0))


def _layout(module: nn.Module) -> Layout:
    found = layout(module)
    assert found is not None, "survey finds modules that hold experts only"
    return found


def _parts(module: Any) -> list[Any]:
    return [part for part in module.values() if not isinstance(part, nn.Dropout)]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.children() if isinstance(part, nn.Linear)]


def _elementwise(function: Any) -> Activation:
    known = recognise(function, type(function).__name__)
    if known is None:
        raise ValueError("the experts' activation is not an elementwise function")
    return known
