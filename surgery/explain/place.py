"""A block of a twin and its surroundings: where it is, what it computes, which norms stand before and after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.blocks import is_norm, norms_around, survey
from surgery.errors import ModelError, RecipeError
from surgery.explain.expansion import BlockPolynomial
from surgery.modeling_polynomial import MODEL_TYPE, BilinearGLU
from surgery.polynomial import Affine


@dataclass(frozen=True)
class Place:
    """One polynomial block within its model.

    Attributes:
        index: its number among all feed-forward blocks, converted or not, as `surgery inspect` counts them.
        path: the block's path.
        entry, exit: modules that receive its input and write its output.
        polynomial: what it computes, float64.
        norm: the module whose output is the block's input; None where the block reads the stream itself.
        final_norm: the same for the unembedding; None where there is none of either.
        normed_after: the block's output passes through a norm before it is added to the stream.
    """

    index: int
    path: str
    entry: nn.Module
    exit: nn.Module
    polynomial: BlockPolynomial
    norm: nn.Module | None = None
    final_norm: nn.Module | None = None
    normed_after: bool = False


class NotATwinError(ModelError):
    """A model none of whose blocks is a polynomial."""


def find(model: Any, index: int) -> Place:
    """Block `index` of a twin.

    Raises:
        NotATwinError: no block of the model is a polynomial.
        RecipeError: there is no such block, or it was not converted.
    """
    entries = {entry["path"]: entry for entry in twin_blocks(model)}
    if not entries:
        raise NotATwinError(
            "none of this model's feed-forward blocks is a polynomial: it is not a twin",
            fix="name a twin, or give --fit to fit this one block on the fly",
        )
    others = {block.path for block in survey(model).blocks} - set(entries)
    paths = [path for path, _ in model.named_modules() if path in entries or path in others]
    if index >= len(paths):
        raise RecipeError(
            f"block {index} was asked for, but the model has blocks 0 to {len(paths) - 1}",
            where="--block",
            fix="`surgery inspect` lists them",
        )
    path = paths[index]
    if path not in entries:
        converted = ", ".join(str(number) for number, other in enumerate(paths) if other in entries)
        raise RecipeError(
            f"block {index} ({path}) was not converted", fix=f"choose one of {converted}, or give --fit to fit it now"
        )
    entry = entries[path]
    if entry["kind"] == "experts":
        raise RecipeError(f"block {index} ({path}) is a mixture of experts, which is not explained yet")
    get = model.get_submodule
    first, last = (entry["first"], entry["last"]) if entry["kind"] in ("plain", "plain_affine") else (path, path)
    return Place(index, path, get(first), get(last), polynomial_of(model, entry))


def twin_blocks(model: Any) -> list[dict[str, Any]]:
    """The entries of `polynomial_blocks`; for a native twin, those it would have."""
    if getattr(model.config, "model_type", None) == MODEL_TYPE:
        return list(model.config.polynomial_blocks)
    loaded = {block.path for block in survey(model).blocks if block.kind == "gated" and block.activation == "linear"}
    return [
        {"path": path, "kind": "bilinear", "degree": 2}
        for path, module in model.named_modules()
        if path in loaded or isinstance(module, BilinearGLU)  # the latter just after its conversion
    ]


def polynomial_of(model: Any, entry: Mapping[str, Any]) -> BlockPolynomial:
    """What a converted block computes, whatever its form."""

    def affine(path: str) -> Affine:
        module = model.get_submodule(path)
        weight = module.weight.detach().double()
        return Affine(weight, weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double())

    path, kind = entry["path"], entry["kind"]
    if kind in ("affine", "plain_affine"):
        only = affine(entry["last"] if kind == "plain_affine" else path)
        out = len(only.bias)
        a = only.bias.new_tensor([0.0, 1.0]).expand(out, 2)
        return BlockPolynomial(only, None, a, None, Affine(torch.eye(out).to(only.weight), torch.zeros_like(only.bias)))
    if kind == "plain":
        a = model.get_submodule(entry["activation"]).coefficients.detach().double().T
        return BlockPolynomial(affine(entry["first"]), None, a, None, affine(entry["last"]))
    gate, up, down = (affine(f"{path}.{part}") for part in ("gate_proj", "up_proj", "down_proj"))
    if kind == "gated":
        module = model.get_submodule(path)
        a, b = (value.detach().double().T for value in (module.coefficients, module.cross_coefficients))
        return BlockPolynomial(gate, up, a, b, down)
    h = len(gate.bias)
    return BlockPolynomial(gate, up, gate.bias.new_zeros(h, 3), gate.bias.new_tensor([0.0, 1.0]).expand(h, 2), down)


def surroundings(model: Any, place: Place, probe: Mapping[str, Tensor]) -> Place:
    """The place with its norms filled in, seen in one forward pass of `probe`.

    A norm is known by what it writes: the very tensor that the block (or the unembedding) reads.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    norms = [module for module in model.modules() if is_norm(module)]
    inside = norms_around(model, place.path)
    written: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # so that no address is used twice
    seen: dict[str, Any] = {"norm": None, "final_norm": None, "normed_after": False}
    output: list[int] = []

    def note(norm: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if isinstance(result, Tensor):
            kept.extend((args[0], result))
            if args[0].data_ptr() in output and norm in inside:
                seen["normed_after"] = True
            written[result.data_ptr()] = norm

    handles = [norm.register_forward_hook(note) for norm in norms]
    handles += [
        place.entry.register_forward_pre_hook(lambda _, args: seen.update(norm=written.get(args[0].data_ptr()))),
        place.exit.register_forward_hook(lambda _, __, result: output.append(result.data_ptr())),
    ]
    if head is not None:
        handles.append(
            head.register_forward_pre_hook(lambda _, args: seen.update(final_norm=written.get(args[0].data_ptr())))
        )
    try:
        with torch.no_grad():
            model(**probe)
    finally:
        for handle in handles:
            handle.remove()
    return replace(place, **seen)


class _BlockReached(Exception):  # noqa: N818 - no error
    """Ends a forward pass behind the block that was asked for."""


@contextmanager
def _recorded(place: Place, rows: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    entered: dict[str, Tensor] = {}

    def leave(_: nn.Module, __: Any, output: Tensor) -> None:
        x, written = entered["x"], output.detach().flatten(0, -2)
        stream = entered.get("stream", x).float().norm(dim=-1)
        rows.append((x, written, torch.maximum(stream, written.float().norm(dim=-1))))
        raise _BlockReached

    def note(name: str) -> Any:
        return lambda _, args: entered.update({name: args[0].detach().flatten(0, -2)})

    handles = [place.entry.register_forward_pre_hook(note("x")), place.exit.register_forward_hook(leave)]
    if place.norm is not None:
        handles.append(place.norm.register_forward_pre_hook(note("stream")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activity(model: Any, place: Place, batches: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The block over all tokens of `batches`: inputs (tokens, d), outputs (tokens, out), and the larger of the norms of
    the residual stream before it and of its output, (tokens,): massive at attention sinks.

    Every forward pass ends at the block: the layers behind it cost nothing.
    """
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad(), _recorded(place, rows):
        for batch in batches:
            before = len(rows)
            try:
                model(**{name: value.to(model.device) for name, value in batch.items()})
            except _BlockReached:
                continue
            if len(rows) == before:
                raise ModelError("the forward pass never reached this block", where=place.path)
    x, y, size = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return x, y, size
