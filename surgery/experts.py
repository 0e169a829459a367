"""Mixtures of experts kept as one module with three-dimensional weights, as transformers 5 keeps them.

Such a module is called with (hidden states (tokens, d), expert numbers (tokens, k), routing weights (tokens, k)) and
says how it keeps its weights: `has_gate`, `has_bias`, `is_transposed`, `is_concatenated`. Each expert is an ordinary
feed-forward block for the tokens routed to it,

    y_t = Σ_j w_tj · f_{e_tj}(x_t),

and is replaced by its own polynomial. A unit need not be σ(gate)·up: what the module itself does with its gate and up
(GPT-OSS clamps both and takes up + 1) is a function of the two, and is fitted as one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.activations import Activation, recognise


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to: numbers and weights, both (tokens, k). Numbers past the last mean none."""

    index: Tensor
    weight: Tensor

    @staticmethod
    def of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing:
        """From the arguments the module was called with, hidden states included."""
        bound = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
        given = [value for value in bound if isinstance(value, Tensor)][1:3]
        index, weight = given if not given[0].is_floating_point() else given[::-1]
        return Routing(index, weight)

    def of_expert(self, number: int) -> tuple[Tensor, Tensor]:
        """Token numbers routed to an expert, and their weights."""
        token, place = torch.where(self.index == number)
        return token, self.weight[token, place]


def why_not(module: nn.Module) -> str | None:
    """Why a module that holds experts cannot be read, or None if it can."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")):
        return "mixture of experts in a form that is not known"
    if getattr(module, "has_post_expert_norm", False):
        return "mixture of experts with a norm behind each expert, which is not a polynomial"
    return None


def count(module: Any) -> int:
    return int(module.down_proj.shape[0])


def widths(module: Any) -> tuple[int, int, int]:
    """d, h, o of one expert."""
    (gate, _), _, (down, _) = weights(module, 0)
    return gate.shape[1], gate.shape[0], down.shape[0]


def weights(
    module: Any, number: int
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None] | None, tuple[Tensor, Tensor | None]]:
    """(weight (out, in), bias) of one expert's gate, up (None where it has no gate) and down."""

    def one(name: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = getattr(module, name)[number], None
        if module.has_bias:
            bias = getattr(module, f"{name}_bias")[number]
        return (weight.T if module.is_transposed else weight), bias

    down = one("down_proj")
    if not module.has_gate:
        return one("up_proj"), None, down
    weight, bias = one("gate_up_proj")
    half = len(weight) // 2
    gate = slice(None, half) if module.is_concatenated else slice(None, None, 2)
    up = slice(half, None) if module.is_concatenated else slice(1, None, 2)
    biases = (None, None) if bias is None else (bias[gate], bias[up])
    return (weight[gate], biases[0]), (weight[up], biases[1]), down


def unit(module: Any) -> Activation:
    """What an expert does between its maps: σ(y), σ(y)·z, or the module's own function of y and z."""
    default = module._apply_gate.__func__.__name__ == "_default_apply_gate"
    if default or not module.has_gate:
        function = getattr(module, "act_fn", None)
        known = None if function is None else recognise(function, type(function).__name__)
        if known is None:
            raise ValueError("the experts' activation is not an elementwise function")
        return known

    def joint(y: Tensor, z: Tensor) -> Tensor:
        both = torch.cat([y, z], dim=-1) if module.is_concatenated else torch.stack([y, z], dim=-1).flatten(-2)
        result: Tensor = module._apply_gate(both)
        return result

    return Activation("the experts' own gate", torch.nn.functional.silu, joint=joint)
