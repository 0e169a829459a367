"""Believes a survey only after the model has been run: each block is recomputed from the weights found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.blocks.block import Block, Call, near
from surgery.blocks.experts import Routing
from surgery.blocks.parts import attribute, layer_of, norms_around
from surgery.errors import CalibrationError, ModelError
from surgery.runtime.weights_on_disk import weights_present

LEAVE_OUT = "leave it out with --blocks; the model is unchanged"


def verify_all(model: nn.Module, blocks: Iterable[Block], run: Callable[[], object]) -> tuple[Block, ...]:
    """:func:`verify_each`, where every block must be.

    Raises:
        ModelError: a block was not reached, or its recomputation differs.
    """
    good, bad = verify_each(model, blocks, run)
    if bad:
        raise next(iter(bad.values()))
    return good


def verify_each(
    model: nn.Module, blocks: Iterable[Block], run: Callable[[], object]
) -> tuple[tuple[Block, ...], dict[str, ModelError]]:
    """Runs the model once and recomputes each block's hidden vector and output from the weights found.

    Raises:
        CalibrationError: a block computes NaN or infinite values.
    Returns:
        the blocks in the order in which they run, those last that run several times; with `additive` and `calls` filled
        in, gate and up exchanged where the recomputation says so, and activations found that no module holds; and by
        path what speaks against the others.
    """
    blocks = tuple(blocks)
    watch = _Watch()
    with watch.over(model, blocks):
        run()
    seen = watch.seen
    for block in filter(_holds_activation, blocks):  # each block's own calls; what is left are others
        watch.activated[id(attribute(model, block.activation_path))] -= len(seen.get(block.last, ()))
    order = list(seen)  # of execution, which is the order of conversion
    good, bad = [], {}
    for block in sorted(blocks, key=lambda block: order.index(block.last) if block.last in order else len(order)):
        _check_finite(block, seen)
        try:
            checked = _recomputed(model, block, watch)
            if _holds_activation(block) and watch.activated[id(attribute(model, block.activation_path))] > 0:
                raise ModelError(
                    "its activation is applied elsewhere too",
                    where=block.path,
                    cause="another part of the layer uses the same function",
                    fix=LEAVE_OUT,
                )
            additive = checked.calls == 1 and _additive(checked, watch)
            good.append(replace(checked, additive=additive))
        except ModelError as error:
            bad[block.path] = error
    return tuple(sorted(good, key=lambda block: block.calls > 1)), bad


def _holds_activation(block: Block) -> bool:
    """Whether conversion replaces the activation itself, by its path."""
    return bool(block.activation_path) and block.activation_path in block.replaced_paths


@dataclass(frozen=True)
class _Watch:
    """What one run of the model shows.

    Attributes:
        seen: (input, output) of every call of a block's modules, by path.
        activated: how often a module that is some block's activation was called, by id.
        routed: where a mixture's tokens go, by path.
        normed: (input, output) of every norm near a block.
        layers: what the blocks' layers write, by path.
    """

    seen: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    activated: Counter[int] = field(default_factory=Counter)
    routed: dict[str, Routing] = field(default_factory=dict)
    normed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    layers: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def over(self, model: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
        """Inside, what the model does is noted."""
        with ExitStack() as hooks:

            def on(module: nn.Module, hook: Callable[..., None]) -> None:
                hooks.callback(module.register_forward_hook(hook).remove)

            holders = {}
            for block in blocks:
                for path in {block.entry, *block.first, block.last}:
                    on(model.get_submodule(path), partial(self._call, path))
                for norm in norms_around(model, block.path):
                    on(norm, self._norm)
                layer = layer_of(block.path)
                on(model.get_submodule(layer), partial(self._layer, layer))
                if block.routed:
                    ahead = partial(self._routing, block.path)
                    handle = model.get_submodule(block.path).register_forward_pre_hook(ahead, with_kwargs=True)
                    hooks.callback(handle.remove)
                if _holds_activation(block):
                    holder = attribute(model, block.activation_path)
                    holders[id(holder)] = holder
            for holder in holders.values():
                if isinstance(holder, nn.Module):
                    on(holder, lambda module, _, __: self.activated.update([id(module)]))
            yield

    def _call(self, path: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self.seen.setdefault(path, []).append((args[0].detach(), output.detach()))

    def _norm(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, Tensor):
            self.normed.append((args[0], output))

    def _layer(self, path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            self.layers[path] = first.detach()

    def _routing(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.routed[path] = Routing.of(module, args, kwargs)


def _check_finite(block: Block, seen: Mapping[str, list[tuple[Tensor, Tensor]]]) -> None:
    if not all(bool(torch.isfinite(output).all()) for _, output in seen.get(block.last, ())):
        raise CalibrationError(
            "the block computes NaN or infinite values",
            where=block.path,
            cause="the weights are damaged, or the precision is too low for this model",
            fix="load it with --dtype float32, or check the checkpoint",
        )


def _additive(block: Block, watch: _Watch) -> bool:
    """Whether the block reads the residual stream, normalised, and the layer writes that stream plus its output."""
    entered, written = watch.seen[block.entry][0][0], watch.seen[block.last][0][1]
    total = watch.layers.get(layer_of(block.path))
    for before, after in watch.normed:
        if total is None or not before.numel() == total.numel() == written.numel():
            continue
        if after.data_ptr() == entered.data_ptr():
            return near(before.flatten() + written.flatten(), total)
    return False


def _recomputed(model: nn.Module, block: Block, watch: _Watch) -> Block:
    """The block as its calls say; raises ModelError where they say something else."""
    calls = {path: len(watch.seen.get(path, [])) for path in {block.entry, *block.first, block.last}}
    if not any(calls.values()):
        raise ModelError(
            "the calibration inputs do not reach this block",
            where=block.path,
            cause="it belongs to another input, an image or audio tower say",
            fix="give inputs that do (a .safetensors file), or leave it out with --blocks",
        )
    count = calls[block.last]
    shapes = {x.shape for x, _ in watch.seen.get(block.entry, ())}
    if set(calls.values()) != {count} or len(shapes) != 1 or (block.routed and count > 1):
        raise ModelError(
            f"its parts were called {' or '.join(map(str, sorted(set(calls.values()))))} times in one forward pass",
            where=block.path,
            cause="the block is routed or skipped",
            fix=LEAVE_OUT,
        )
    found = None
    with weights_present([model.get_submodule(block.path)] if block.routed else []):
        for call in range(count):  # of every call, where layers share it
            one = block.recomputed(
                model, Call({path: watch.seen[path][call] for path in calls}, watch.routed.get(block.path))
            )
            if one is None or found not in (None, one):
                what, inside = block.unlike
                raise ModelError(
                    f"recomputing the {what} from the weights found does not give what the model computes",
                    where=block.path,
                    cause=f"something else happens inside it ({inside})",
                    fix=LEAVE_OUT,
                )
            found = one
    assert found is not None
    return replace(found, calls=count)
