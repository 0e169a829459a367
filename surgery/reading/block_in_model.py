"""A block of a twin and its surroundings: where it is, what it computes, which norms stand before and after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.blocks.find import survey
from surgery.blocks.parts import is_norm, norms_around
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.errors import ModelError, RecipeError
from surgery.models.saved_blocks import SavedExperts, twin_blocks
from surgery.runtime.hooks import hooked
from surgery.runtime.progress import progress


@dataclass(frozen=True)
class BlockInModel:
    """One polynomial block within its model.

    Attributes:
        index: its number among all feed-forward blocks, converted or not, as `surgery inspect` counts them.
        path: the block's path.
        entry, exit: modules that receive its input and write its output.
        polynomial: what it computes, float64.
        norm: the module whose output is the block's input; None where the block reads the stream itself.
        final_norm: the same for the unembedding; None where there is none of either.
        normed_after: the block's output passes through a norm before it is added to the stream.
        expert: its number, where the block is one expert of a mixture.
        routed_to: what the arguments of the module's call bring to it, (tokens, d), NaN elsewhere; None of any other.
    """

    index: int
    path: str
    entry: nn.Module
    exit: nn.Module
    polynomial: BlockPolynomial
    norm: nn.Module | None = None
    final_norm: nn.Module | None = None
    normed_after: bool = False
    expert: int | None = None
    routed_to: Callable[..., Tensor] | None = None


class NotATwinError(ModelError):
    """A model none of whose blocks is a polynomial."""


def find_block(model: Any, index: int, expert: int | None = None) -> BlockInModel:
    """Block `index` of a twin, or one expert of it.

    Raises:
        NotATwinError: no block of the model is a polynomial.
        RecipeError: there is no such block or expert, or it was not converted.
    """
    entries = {saved.path: saved for saved in twin_blocks(model)}
    others = {block.path for block in survey(model).blocks} - set(entries)
    paths = [path for path, _ in model.named_modules() if path in entries or path in others]
    if paths and index >= len(paths):
        raise RecipeError(
            f"block {index} was asked for, but the model has blocks 0 to {len(paths) - 1}",
            where="--block",
            fix="`surgery inspect` lists them",
        )
    if not entries:
        raise NotATwinError(
            "none of this model's feed-forward blocks is a polynomial: it is not a twin",
            fix="name a twin, or give --fit to fit this one block on the fly",
        )
    path = paths[index]
    if path not in entries:
        converted = ", ".join(str(number) for number, other in enumerate(paths) if other in entries)
        raise RecipeError(
            f"block {index} ({path}) was not converted", fix=f"choose one of {converted}, or give --fit to fit it now"
        )
    saved = entries[path]
    first, last = (model.get_submodule(part) for part in (saved.paths[0], saved.paths[-1]))
    if not isinstance(saved, SavedExperts):
        if expert is not None:
            raise RecipeError(
                f"block {index} ({path}) is not a mixture of experts", where="--expert", fix="leave it out"
            )
        return BlockInModel(index, path, first, last, saved.read(model))
    if expert is None or expert >= first.number:
        raise RecipeError(
            f"block {index} ({path}) is a mixture of {first.number} experts"
            + ("" if expert is None else f", and {expert} is none of them"),
            where="--expert",
            fix=f"name one of them, as in --expert {first.number - 1}",
        )
    own = partial(saved.routed_to, model, expert)
    return BlockInModel(index, path, first, last, saved.read_expert(model, expert), expert=expert, routed_to=own)


def surroundings(model: Any, block: BlockInModel, probe: Mapping[str, Tensor]) -> BlockInModel:
    """The block with its norms filled in, seen in one forward pass of `probe`.

    A norm is known by what it writes: the very tensor that the block (or the unembedding) reads.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    norms = [module for module in model.modules() if is_norm(module)]
    inside = list(norms_around(model, block.path).values())
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
        block.entry.register_forward_pre_hook(lambda _, args: seen.update(norm=written.get(args[0].data_ptr()))),
        block.exit.register_forward_hook(lambda _, __, result: output.append(result.data_ptr())),
    ]
    if head is not None:
        handles.append(
            head.register_forward_pre_hook(lambda _, args: seen.update(final_norm=written.get(args[0].data_ptr())))
        )
    with torch.no_grad(), hooked(handles):
        model(**probe)
    return replace(block, **seen)


class _BlockReached(Exception):  # noqa: N818 - no error
    """Ends a forward pass after the block that was asked for."""


@dataclass(frozen=True)
class Recorded:
    """A block over a text, on the CPU.

    Attributes:
        x, y: its inputs, (tokens, d), and its outputs, (tokens, out); NaN where a token does not go to this expert.
        stream: the residual stream before its norm, (tokens, d); x itself where no norm stands before the block.
    """

    x: Tensor
    y: Tensor
    stream: Tensor

    @property
    def size(self) -> Tensor:
        """The larger of the norms of the stream and of the output, (tokens,): massive at attention sinks, NaN as y."""
        return torch.maximum(self.stream.float().norm(dim=-1), self.y.float().norm(dim=-1))


@contextmanager
def _recorded(block: BlockInModel, rows: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    entered: dict[str, Tensor] = {}

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x, written = entered["x"], output.detach().flatten(0, -2)
        if block.routed_to is not None:
            x = block.routed_to(*args, *kwargs.values())
            written = block.polynomial(x.double()).to(x)
        rows.append((x, written, entered.get("stream", x)))
        raise _BlockReached

    def note(name: str) -> Any:
        return lambda _, args: entered.update({name: args[0].detach().flatten(0, -2)})

    handles = [
        block.entry.register_forward_pre_hook(note("x")),
        block.exit.register_forward_hook(leave, with_kwargs=True),
    ]
    if block.norm is not None:
        handles.append(block.norm.register_forward_pre_hook(note("stream")))
    with hooked(handles):
        yield


def recorded_activity(
    model: Any, block: BlockInModel, batches: Sequence[Mapping[str, Tensor]], quiet: bool = True
) -> Recorded:
    """The block over all tokens of `batches`.

    Every forward pass ends at the block: the layers after it cost nothing.
    """
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad(), _recorded(block, rows), progress(len(batches), "reading", quiet) as bar:
        for batch in batches:
            bar.update(1)
            before = len(rows)
            try:
                model(**{name: value.to(model.device) for name, value in batch.items()})
            except _BlockReached:
                continue
            if len(rows) == before:
                raise ModelError("the forward pass never reached this block", where=block.path)
    return Recorded(*(torch.cat(parts).cpu() for parts in zip(*rows, strict=True)))
