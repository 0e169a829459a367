"""Parts of a network by their paths: matrices, norms, layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """A matrix: nn.Linear, or GPT-2's Conv1D, which keeps it transposed."""
    return type(module).__name__ == "Conv1D" or isinstance(module, nn.Linear)


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(out, in) weight, whatever way the module keeps it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    bias = getattr(module, "bias", None)
    return (weight.T if type(module).__name__ == "Conv1D" else weight), bias


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a matrix."""
    weight, _ = weight_and_bias(module)
    return weight.shape[0], weight.shape[1]


def attribute(model: nn.Module, path: str) -> Any:
    """What stands at a dotted path: a module, or a plain function kept as an attribute."""
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def layer_of(path: str) -> str:
    """Path of the layer (member of the innermost stack) a block belongs to, or the block's own path."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return path


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer: one-dimensional parameters, no children."""
    own = list(module.parameters())
    return bool(own) and not list(module.children()) and all(parameter.dim() == 1 for parameter in own)


def norms_around(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """Normalisation layers of the layer that the block at `path` belongs to, by path."""
    layer = layer_of(path)
    inside = model.get_submodule(layer).named_modules(prefix=layer)
    return {name: module for name, module in inside if is_norm(module)}
