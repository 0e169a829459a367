"""Believes a survey only after the model has been run: each block is recomputed from the weights found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.activations import ACTIVATIONS, Activation
from surgery.blocks import Block, activation_of, attribute, layer_of, norms_around
from surgery.errors import CalibrationError, ModelError
from surgery.experts import Routing, count, folded, passes, widths
from surgery.features import Original
from surgery.on_disk import in_memory

TOLERANCE = 1e-3  # relative; a wrong reading of a block is off by the size of its output
LEAVE_OUT = "leave it out with --blocks; the model is unchanged"


def confirm(model: nn.Module, blocks: Iterable[Block], run: Callable[[], object]) -> tuple[Block, ...]:
    """:func:`confirmed`, where every block must be.

    Raises:
        ModelError: a block was not called exactly once, or its recomputation differs.
    """
    good, bad = confirmed(model, blocks, run)
    if bad:
        raise next(iter(bad.values()))
    return good


def confirmed(
    model: nn.Module, blocks: Iterable[Block], run: Callable[[], object]
) -> tuple[tuple[Block, ...], dict[str, ModelError]]:
    """Runs the model once and recomputes each block's hidden vector and output from the weights found.

    Raises:
        CalibrationError: a block computes NaN or infinite values.
    Returns:
        the blocks in the order in which they run, with `additive` filled in, gate and up exchanged where the
        recomputation says so, and activations found that no module holds; and by path what speaks against the others.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    activated: Counter[int] = Counter()
    routed: dict[str, Routing] = {}
    normed: list[tuple[Tensor, Tensor]] = []
    layers: dict[str, Tensor] = {}
    hooks = []

    def record(path: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen.setdefault(path, []).append((args[0].detach(), output.detach()))

        hooks.append(model.get_submodule(path).register_forward_hook(hook))

    def record_routing(path: str) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routed[path] = Routing.of(module, args, kwargs)

        hooks.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))

    def record_norm(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, Tensor):
            normed.append((args[0], output))

    def record_layer(path: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                layers[path] = first.detach()

        hooks.append(model.get_submodule(path).register_forward_hook(hook))

    blocks = tuple(blocks)
    for block in blocks:
        for path in {block.entry, *block.first, block.last}:
            record(path)
        for norm in norms_around(model, block.path):
            hooks.append(norm.register_forward_hook(record_norm))
        record_layer(layer_of(block.path))
        if block.kind == "experts":
            record_routing(block.path)
    holders = [attribute(model, block.activation_path) for block in blocks if block.kind == "plain"]
    shared = Counter(id(holder) for holder in holders)
    for holder in {id(holder): holder for holder in holders}.values():
        if isinstance(holder, nn.Module):
            hooks.append(holder.register_forward_hook(lambda module, _, __: activated.update([id(module)])))
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    order = list(seen)  # the order of execution, which is the order of conversion
    good, bad = [], {}
    for block in sorted(blocks, key=lambda block: order.index(block.last) if block.last in order else len(order)):
        _check_finite(block, seen)
        try:
            checked = (
                _confirmed_experts(model, block, seen, routed)
                if block.kind == "experts"
                else _confirmed(model, block, seen)
            )
            if block.kind == "plain":
                _only_here(attribute(model, block.activation_path), block, activated, shared)
            good.append(replace(checked, additive=_additive(model, checked, seen, normed, layers)))
        except ModelError as error:
            bad[block.path] = error
    return tuple(good), bad


def _check_finite(block: Block, seen: Mapping[str, list[tuple[Tensor, Tensor]]]) -> None:
    if not all(bool(torch.isfinite(output).all()) for _, output in seen.get(block.last, ())):
        raise CalibrationError(
            "the block computes NaN or infinite values",
            where=block.path,
            cause="the weights are damaged, or the precision is too low for this model",
            fix="load it with --dtype float32, or check the checkpoint",
        )


def _only_here(holder: Any, block: Block, calls: Counter[int], blocks: Counter[int]) -> None:
    """Raises ModelError if the activation, which is to be replaced, is applied to anything else."""
    if calls[id(holder)] > blocks[id(holder)]:
        raise ModelError(
            "its activation is applied elsewhere too",
            where=block.path,
            cause="another part of the layer uses the same function",
            fix=LEAVE_OUT,
        )


def _additive(
    model: nn.Module,
    block: Block,
    seen: dict[str, list[tuple[Tensor, Tensor]]],
    normed: list[tuple[Tensor, Tensor]],
    layers: dict[str, Tensor],
) -> bool:
    entered, written = seen[block.entry][0][0], seen[block.last][0][1]
    total = layers.get(layer_of(block.path))
    for before, after in normed:
        if total is None or not before.numel() == total.numel() == written.numel():
            continue
        if after.data_ptr() == entered.data_ptr():
            return _near(before.flatten() + written.flatten(), total)
    return False


def _confirmed_experts(
    model: nn.Module, block: Block, seen: dict[str, list[tuple[Tensor, Tensor]]], routed: dict[str, Routing]
) -> Block:
    if len(seen.get(block.path, [])) != 1:
        raise ModelError("the experts were not called once in one forward pass", where=block.path, fix=LEAVE_OUT)
    module = model.get_submodule(block.path)
    x, output = (folded(module, value) for value in seen[block.path][0])
    with in_memory([module]):
        found = recomputed(module, x.flatten(0, -2), routed[block.path])
    if not _near(found, output):
        raise ModelError(
            "recomputing the experts from the weights found does not give what the model computes",
            where=block.path,
            cause="the routing weights are used in another way, or something else happens inside",
            fix=LEAVE_OUT,
        )
    return block


def recomputed(module: nn.Module, x: Tensor, routing: Routing) -> Tensor:
    """What a module of experts computes, from the weights found."""
    total = x.new_zeros(len(x), widths(module)[2])
    for number in range(count(module)):
        rows, weight = routing.of_expert(number)
        if len(rows):
            total.index_add_(0, rows, (Original.of_expert(module, number)(x[rows]) * weight[:, None]).to(total.dtype))
    if passes(module):
        rows, place = torch.where(routing.index >= count(module))
        total.index_add_(0, rows, (x[rows] * routing.weight[rows, place, None]).to(total.dtype))
    return total


def _confirmed(model: nn.Module, block: Block, seen: dict[str, list[tuple[Tensor, Tensor]]]) -> Block:
    calls = {path: len(seen.get(path, [])) for path in {block.entry, *block.first, block.last}}
    if not any(calls.values()):
        raise ModelError(
            "the calibration inputs do not reach this block",
            where=block.path,
            cause="it belongs to another input, an image or audio tower say",
            fix="give inputs that do (a .safetensors file), or leave it out with --blocks",
        )
    if set(calls.values()) != {1}:
        raise ModelError(
            f"its parts were called {' or '.join(map(str, sorted(set(calls.values()))))} times in one forward pass",
            where=block.path,
            cause="the block is shared, routed or skipped",
            fix=LEAVE_OUT,
        )
    hidden_in = seen[block.last][0][0]
    parts = [seen[path][0][1] for path in block.first]
    entry_in, entry_out = seen[block.entry][0]
    same_input = all(torch.equal(seen[path][0][0].flatten(), entry_in.flatten()) for path in block.first)
    same_output = block.kind == "plain" or _near(entry_out, seen[block.last][0][1])
    for activation in _activations(model, block) if same_input and same_output else ():
        if block.kind == "plain":
            readings = {block.first: activation.function(parts[0])}
        else:
            gate, up = parts if block.kind == "gated" else parts[0].chunk(2, dim=-1)
            readings = {block.first: activation.function(gate) * up}
            if block.kind == "gated":
                readings[block.first[::-1]] = activation.function(up) * gate
        for first, hidden in readings.items():
            if _near(hidden, hidden_in):
                return replace(block, first=first, activation=activation.name)
    raise ModelError(
        f"recomputing the {block.kind} block from the weights found does not give what the model computes",
        where=block.path,
        cause="something else happens inside it (clamping, a norm, another order of gate and up)",
        fix=LEAVE_OUT,
    )


def _activations(model: nn.Module, block: Block) -> list[Activation]:
    """The block's own, or where it is called as a function all that are known."""
    if not block.activation_path:
        return list(ACTIVATIONS.values())
    return [activation_of(attribute(model, block.activation_path), block)]


def _near(a: Tensor, b: Tensor) -> bool:
    tolerance = max(TOLERANCE, 4 * torch.finfo(b.dtype).eps)  # in bfloat16 another order of rounding is off by more
    a, b = a.float().flatten(), b.float().flatten()
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm() + 1e-30)
