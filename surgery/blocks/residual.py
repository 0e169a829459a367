"""How a block's output joins the residual stream, seen in a run of the model.

    R' = r + c·f             pre-norm (Llama, GPT-2), r what the norm read; parallel (GPT-NeoX, Phi), r with what the
                             attention wrote; shared experts beside others, r with what they wrote
    R' = r + N(f)            a norm after the block (Gemma 2 and 3, OLMo 2)
    R' = N(r + f)            post-norm (BERT), r the block's own input

Where r is found is tried in turn, the cheap places first: what the norm before the block read, the block's input, and
what the layer writes when the block writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.runtime.hooks import hooked

NORM, INPUT, LAYER = "norm", "input", "layer"
OUTPUT, SUM = "output", "sum"
NEAR = 1e-2  # of a token's own output: what else is written there is of its size
LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class Residual:
    """The place where a block's output is added.

    Attributes:
        base: where the stream r before it is found: `norm`, what the norm before the block reads; `input`, what the
            block itself reads; `layer`, what the layer writes without the block.
        scale: c.
        norm: path of N, empty where there is none.
        normed: what N takes: `output`, the block's, or `sum`, the stream with it.
    """

    base: str
    scale: float = 1.0
    norm: str = ""
    normed: str = ""


def joined(
    written: Tensor, total: Tensor, bases: Mapping[str, Tensor], norms: Mapping[str, tuple[Tensor, Tensor]]
) -> Residual | None:
    """How the layer's output comes from the block's; None where it is none of the known ways.

    Args:
        written, total: outputs of the block and of its layer, (…, d).
        bases: what r may be, by its name in :class:`Residual`; the first that fits is taken.
        norms: (input, output) of the layer's norms, by path.
    """
    d = total.shape[-1]
    flat = {name: value.reshape(-1, d).float() for name, value in bases.items() if value.numel() == total.numel()}
    if written.numel() != total.numel():
        return None
    slack = 4 * torch.finfo(total.dtype).eps
    f, after = written.reshape(-1, d).float(), total.reshape(-1, d).float()

    def same(a: Tensor, b: Tensor, size: Tensor) -> bool:
        allowed = NEAR * size.norm(dim=-1) + slack * b.norm(dim=-1)
        return bool(((a - b).norm(dim=-1) <= allowed).all())

    around = {
        path: (before.reshape(-1, d).float(), result.reshape(-1, d).float())
        for path, (before, result) in norms.items()
        if before.numel() == result.numel() == total.numel()
    }
    for name, r in flat.items():
        scale = float((f * (after - r)).sum() / f.square().sum().clamp_min(1e-30))
        scale = 1.0 if abs(scale - 1) < NEAR else scale
        if abs(scale) > LEAST_SCALE and same(r + scale * f, after, scale * f):
            return Residual(name, scale)
        for path, (before, result) in around.items():
            if same(before, f, f) and same(r + result, after, result):
                return Residual(name, norm=path, normed=OUTPUT)
            if same(before, r + f, f) and same(result, after, after):
                return Residual(name, norm=path, normed=SUM)
    return None


def without_blocks(
    model: nn.Module, layers: Mapping[str, str], exits: Mapping[str, str], run: Callable[[], object]
) -> dict[str, Tensor]:
    """What each block's layer writes in one run when the block writes nothing.

    Args:
        layers, exits: paths of the layer, and of the module that writes the block's output, by the block's path.
    """
    found: dict[str, Tensor] = {}
    again = False

    def hook(path: str) -> Callable[..., None]:
        def rerun(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            nonlocal again
            if again:
                return
            again = True
            try:
                with hooked([model.get_submodule(exits[path]).register_forward_hook(_nothing)]):
                    output = stream_of(layer(*args, **kwargs))
            except Exception:  # a layer that cannot be run twice is one of which nothing is known
                output = None
            finally:
                again = False
            if output is not None:
                found[path] = output.detach()

        return rerun

    with hooked(
        model.get_submodule(layer).register_forward_hook(hook(path), with_kwargs=True) for path, layer in layers.items()
    ):
        run()
    return found


def _nothing(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def stream_of(output: Any) -> Tensor | None:
    """The residual stream among what a layer returns."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None
