"""Believes a survey only after the model has been run: each block is recomputed from the weights found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.blocks.block import Block, Call
from surgery.blocks.experts import Routing, folded
from surgery.blocks.parts import attribute, layer_of, norms_around
from surgery.blocks.residual import INPUT, LAYER, NORM, Residual, joined, stream_of, without_blocks
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
        the blocks in the order in which they run, those last that run several times; with `residual` and `calls` filled
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
            good.append(checked)
        except ModelError as error:
            bad[block.path] = error
    good = _with_residuals(model, good, watch, run)
    return tuple(sorted(good, key=lambda block: block.calls > 1)), bad


def _with_residuals(model: nn.Module, blocks: Sequence[Block], watch: _Watch, run: Callable[[], object]) -> list[Block]:
    """The blocks with `residual` filled in; one more run where what was seen does not say it of all."""
    known = [replace(block, residual=_joined(model, block, watch, watch.bases(block))) for block in blocks]
    left = [block for block in known if block.residual is None and block.calls == 1 and block.path != _layer(block)]
    if not left:
        return known
    without = without_blocks(
        model, {block.path: _layer(block) for block in left}, {block.path: block.exit for block in left}, run
    )
    return [
        replace(block, residual=_joined(model, block, watch, {LAYER: without[block.path]}))
        if block.path in without
        else block
        for block in known
    ]


def _joined(model: nn.Module, block: Block, watch: _Watch, bases: Mapping[str, Tensor]) -> Residual | None:
    total = watch.layers.get(_layer(block))
    if total is None:
        return None
    inside = {path: seen for path, seen in watch.normed.items() if path.startswith(f"{_layer(block)}.")}
    written = watch.seen[block.exit][-1][1]
    if block.routed:
        written = folded(model.get_submodule(block.path), written)
    return joined(written, total, bases, inside)


def _layer(block: Block) -> str:
    return layer_of(block.path)


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
        normed: (input, output) of the last call of every norm near a block, by path.
        layers: what the blocks' layers write in their last call, by path.
    """

    seen: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    activated: Counter[int] = field(default_factory=Counter)
    routed: dict[str, Routing] = field(default_factory=dict)
    normed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
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
                for path, norm in norms_around(model, block.path).items():
                    on(norm, partial(self._norm, path))
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

    def bases(self, block: Block) -> dict[str, Tensor]:
        """What the block's output may be added to, as far as it can be told from what was seen."""
        entered = self.seen[block.entry][-1][0]
        read = [before for before, after in self.normed.values() if after.data_ptr() == entered.data_ptr()]
        return ({NORM: read[-1]} if read else {}) | {INPUT: entered}

    def _norm(self, path: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, Tensor):
            self.normed[path] = args[0].detach(), output.detach()

    def _layer(self, path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        stream = stream_of(output)
        if stream is not None:
            self.layers[path] = stream.detach()

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
