"""Block after block: forward passes that wait at each block until its replacement is ready.

Every calibration batch runs as an ordinary forward pass of the model itself, in a greenlet that stops when it reaches
a feed-forward block. When all batches have arrived the block's inputs are complete, and they were computed with every
earlier block already replaced. The block is fitted, installed, and the passes go on. So calibration costs a forward
pass plus the fits, and nothing has to be known about the architecture around the blocks: attention masks, parallel
residuals, post-norms and encoder-decoder wiring stay the model's own code.

Where wanted, a second set of passes keeps to the original blocks, so that a block can be asked to make up for what the
earlier replacements got wrong (the difference of the two residual streams at its entrance).

Memory: the local variables of the suspended passes, about three hidden states per token and set of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from surgery.blocks.block import Block
from surgery.blocks.experts import Routing, folded
from surgery.blocks.parts import attribute, layer_of, norms_around
from surgery.blocks.residual import INPUT, LAYER, stream_of
from surgery.calibration.arrivals import Arrival, Station, kept_rows
from surgery.calibration.held_out import fitted_sequences
from surgery.errors import CalibrationError, ModelError
from surgery.models.modeling_polynomial import install
from surgery.runtime import processes
from surgery.runtime.precision import autocast
from surgery.runtime.weights_on_disk import device_of, in_file


class _Pass(greenlet):
    """One suspended forward pass."""

    original = False
    supplied: Tensor | None = None
    normed: tuple[Tensor, Tensor] | None = None
    size: Tensor | None = None
    routing: Routing | None = None
    layer: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None  # where it is, and what that was called with
    without: str = ""  # path of the block that writes nothing while its layer is run for what else it writes
    base: Tensor | None = None


class _Fork(nn.Module):
    """Stands where a module of a block was: the original for passes of the original stream, the twin's for others."""

    def __init__(self, stands_for: Callable[..., Any], path: str, block: Block) -> None:
        super().__init__()
        self.block = block
        self.original = stands_for
        self.current = stands_for
        self.entrance, self.exit = path == block.entry, path == block.exit
        self.from_layer = _from_layer(block)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        me = getcurrent()
        if not isinstance(me, _Pass):
            return self.current(x, *args, **kwargs)
        if me.without == self.block.path and self.exit:
            return x.new_zeros(*x.shape[:-1], self.block.out)
        if self.entrance and not me.without:
            assert me.parent is not None
            if self.from_layer:
                self._run_without(me)
            if self.block.routed:
                self._wait_routed(me, x, args, kwargs)
            else:
                me.parent.switch(x)
            if me.supplied is not None:
                supplied, me.supplied = me.supplied.view(*x.shape[:-1], -1), None
                return supplied
        if me.original or self.current is self.original:
            return self.original(x, *args, **kwargs)
        # A polynomial's products may carry offsets that cancel in its readout: they are not rounded on the way.
        rounding = torch.is_autocast_enabled(x.device.type)
        with autocast("float32", x.device):
            return self.current(x.float() if rounding else x, *args, **kwargs)

    def _run_without(self, me: _Pass) -> None:
        """Runs the layer once more, from its beginning, for what it writes without this block."""
        assert me.layer is not None
        layer, args, kwargs = me.layer
        me.without = self.block.path
        me.base = stream_of(layer(*args, **kwargs))
        me.without = ""

    def _wait_routed(self, me: _Pass, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        original = cast(nn.Module, self.original)
        me.routing, arrived = Routing.of(original, (x, *args), kwargs), folded(original, x)
        assert me.parent is not None
        room = x.untyped_storage()
        if arrived is x or room.nbytes() != x.nbytes or not x.is_contiguous():
            me.parent.switch(arrived)
            return
        # Inputs repeated for every expert are zero where a token goes elsewhere: they need not wait in memory.
        size, index = room.nbytes(), me.routing.index[:, 0]
        room.resize_(0)
        me.parent.switch(arrived)
        room.resize_(size)
        token = torch.where(index < len(x) // len(arrived))[0]
        x.zero_().view(-1, *arrived.shape)[index[token], token] = arrived[token]

    def __getattr__(self, name: str) -> Any:  # models look at `wo.weight.dtype` and the like
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("current"), name)


class Passes:
    """Forward passes over `batches`, advanced together from block to block; iterate to get :class:`Station`.

    Use as a context manager: on exit, whatever happens, the passes are dropped and no fork is left behind.
    Between two stations, :meth:`replace` puts the finished modules in, and :meth:`supply` may hand a pass the block's
    output where it has been computed already.

    Args:
        follow_original: run a second set of passes through the original blocks.
        first_is_sink: the first token of every sequence is a sink.
        probe: inputs of one more pass, which nothing is fitted on; its output through the twin is `outcome` in the end.
        spill: for models larger than memory, a folder for hidden states: waiting passes keep theirs in (deleted) files
            there, which the system writes out when it needs the memory; and new modules leave memory when all passes
            are beyond them.
        matmul: what matrices are multiplied in on the way from block to block; the probe's keep the model's own.
    With several processes, each gives all batches and runs its own.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        blocks: Sequence[Block],
        follow_original: bool = False,
        first_is_sink: bool = False,
        probe: Mapping[str, Tensor] | None = None,
        spill: Path | None = None,
        matmul: str = "float32",
    ) -> None:
        self.model, self.blocks = model, blocks
        self.total = len(batches)
        self.number, self.batches = processes.own_part(batches)
        self.fitted = fitted_sequences(batches)[self.number :]
        self.follow_original, self.first_is_sink = follow_original, first_is_sink
        self.probe, self.spill, self.outcome = probe, spill, None
        self.dtype = next(model.parameters()).dtype  # of what a block is fitted on
        self.matmul = matmul if self.dtype == torch.float32 else "float32"
        self._forks: dict[str, _Fork] = {}
        self._hooks: list[Any] = []
        self._passes: list[tuple[_Pass, ...]] = []
        self._probing: _Pass | None = None

    def __enter__(self) -> Passes:
        if processes.count() > self.total > 0:  # known to all, so that all say it
            raise CalibrationError(
                f"{processes.count()} processes, but {self.total} calibration batches",
                cause="every process needs one",
                fix="more --tokens, a smaller --batch, or fewer processes",
            )
        # One switch for all passes: gradient mode belongs to the thread, and a pass that is dropped inside a no_grad of
        # its own would put back whatever it found when it began.
        self._gradients = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        for block in self.blocks:
            for path in block.replaced_paths:
                fork = _Fork(attribute(self.model, path), path, block)
                install(self.model, path, fork)
                self._forks[path] = fork
            layer = self.model.get_submodule(layer_of(block.path))
            note = partial(_note_layer, _from_layer(block))
            self._hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
            for norm in norms_around(self.model, block.path).values():
                self._hooks.append(norm.register_forward_hook(_note_norm))
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        for pair in self._passes:
            for forward in pair:
                if forward and not forward.dead:
                    forward.throw(GreenletExit)
        self._passes.clear()
        torch.set_grad_enabled(self._gradients)
        for handle in self._hooks:
            handle.remove()
        for path, fork in self._forks.items():
            install(self.model, path, cast(nn.Module, fork.current))

    def replace(self, modules: Mapping[str, nn.Module]) -> None:
        """From now on the twin's passes find these modules at these paths."""
        for path, module in modules.items():
            if path in self._forks:
                self._forks[path].current = module
            else:
                install(self.model, path, module)

    def supply(self, batch: int, output: Tensor, original: bool = False) -> None:
        """What the waiting block returns to this pass; only where the entrance is the whole block."""
        self._passes[batch][int(original)].supplied = output

    def __iter__(self) -> Iterator[Station]:
        for index, block in enumerate(self.blocks):
            columns: list[list[Arrival]] = []
            for number, batch in enumerate(self.batches):
                if index == 0:
                    self._passes.append(self._start())
                arrivals = []
                for forward in self._passes[number]:
                    x = self._advance(forward, *([batch] if index == 0 else []))
                    arrivals.append(self._arrival(block, x, forward, number))
                columns.append(arrivals)
            if self.probe is not None:
                self._advance_probe()
            if index:  # every pass is beyond the previous block now, so its original weights can go
                self._leave(self.blocks[index - 1])
            twin = tuple(column[0] for column in columns)
            original = tuple(column[1] for column in columns) if self.follow_original else ()
            yield Station(block, self._originals(block), twin, original, self.number)
        if self.probe is not None:
            self.outcome = self._advance_probe()
        for block in self.blocks[-1:]:
            self._leave(block)

    def _advance(self, forward: _Pass, *given: Any) -> Any:
        """On to the next block: its input."""
        with autocast(self.matmul, device_of(self.model)):  # left while the pass waits: a context belongs to the thread
            return forward.switch(*given)

    def _advance_probe(self) -> Any:
        if self._probing is None:
            self._probing = self._start()[0]
            self._passes.append((self._probing,))
            return self._probing.switch(self.probe)
        return self._probing.switch()

    def _leave(self, block: Block) -> None:
        for path in block.replaced_paths:
            fork = self._forks[path]
            if self.spill is not None and isinstance(fork.current, nn.Module):
                fork.current.to("meta")
            fork.original = fork.current

    def _originals(self, block: Block) -> dict[str, Any]:
        return {
            path: self._forks[path].original if path in self._forks else attribute(self.model, path)
            for path in block.parts
        }

    def _arrival(self, block: Block, x: Any, forward: _Pass, number: int) -> Arrival:
        batch = self.batches[number]
        if not isinstance(x, Tensor):
            raise ModelError(
                "the forward pass ended before it reached this block",
                where=block.path,
                cause="the calibration inputs do not exercise it, or it runs before an earlier one",
            )
        base = _base(block, x, forward)
        if self.spill is not None:
            waiting = (x, base, forward.normed[0] if forward.normed is not None else None)
            for held in {id(part): part for part in waiting if part is not None}.values():
                in_file(held, self.spill)
        flat = x.detach().flatten(0, -2).to(self.dtype)
        if not bool(torch.isfinite(flat).all()):
            raise CalibrationError(
                f"the block's input holds NaN or infinite values (calibration batch {number})",
                where=block.path,
                cause="the weights are damaged, or the precision is too low for this model",
                fix="load it with --dtype float32, or check the checkpoint",
            )
        residual = None if base is None else base.detach().reshape(-1, base.shape[-1]).to(self.dtype)
        forward.normed, forward.base, routing, forward.routing = None, None, forward.routing, None
        size = forward.size if residual is None else residual.norm(dim=-1)
        if size is None or len(size) != len(flat):
            size = flat.norm(dim=-1)
        rows = len(next(iter(batch.values())))
        held = torch.arange(len(flat), device=flat.device) >= self.fitted[number] * max(1, len(flat) // rows)
        keep = kept_rows(block, batch, flat)
        known = torch.zeros_like(keep)
        if self.first_is_sink and len(flat) % rows == 0:
            order = keep.view(rows, -1).long().cumsum(-1)
            known = (keep.view(rows, -1) & (order == 1)).flatten()
        return Arrival(flat, keep, residual, size.float(), held, known, routing)

    def _start(self) -> tuple[_Pass, ...]:
        def run(batch: Mapping[str, Tensor]) -> Any:
            return self.model(**batch)

        pair = [_Pass(run)]
        if self.follow_original:
            pair.append(_Pass(run))
            pair[1].original = True
        return tuple(pair)


def _from_layer(block: Block) -> bool:
    """Whether the stream that the block's output joins is found by running the layer without it."""
    return block.residual is not None and block.residual.base == LAYER


def _base(block: Block, x: Tensor, forward: _Pass) -> Tensor | None:
    """The stream that the block's output joins, where it is known how."""
    if block.residual is None:
        return None
    if block.residual.base == INPUT:
        return x
    if _from_layer(block):
        return forward.base
    found = forward.normed is not None and forward.normed[1].data_ptr() == x.data_ptr()
    return forward.normed[0] if found and forward.normed is not None else None


def _note_layer(rerun: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    me, hidden = getcurrent(), args[0] if args else kwargs.get("hidden_states")
    if isinstance(me, _Pass) and not me.without:
        if rerun:
            me.layer = layer, args, kwargs
        if isinstance(hidden, Tensor):
            me.size = hidden.detach().flatten(0, -2).norm(dim=-1)


def _note_norm(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    me = getcurrent()
    if isinstance(me, _Pass) and args and isinstance(output, Tensor):
        me.normed = (args[0], output)
