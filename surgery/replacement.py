"""Fits and installs the blocks, one after another, while the calibration passes wait."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from surgery import group, on_disk, shared, swap
from surgery.blocks import Block, attribute
from surgery.calibration import Calibration
from surgery.errors import CalibrationError
from surgery.fit import FitSettings, FittedBlock, Gaussian, fit_block
from surgery.fit_experts import FittedExperts, fit_experts
from surgery.modeling_polynomial import install
from surgery.progress import Progress
from surgery.recipe import Recipe
from surgery.report import block_row
from surgery.resume import Workshop
from surgery.stream import Station, Stream

CACHE_BYTES = 1 << 30  # hidden vectors kept per block, so that they are computed once


@dataclass(frozen=True)
class Task:
    """What is to be replaced, with everything a fit needs.

    Attributes:
        blocks: in the order in which they run, confirmed.
        given: distributions of the blocks' inputs by path, for `assume: gaussian`.
        first_is_sink: the first token of a sequence turns into an attention sink.
    """

    model: Any
    blocks: tuple[Block, ...]
    data: Calibration
    plan: Recipe
    given: Mapping[str, Gaussian]
    first_is_sink: bool
    quiet: bool

    def settings(self, degree: int, native: bool) -> FitSettings:
        plan = self.plan
        return FitSettings(
            degree=degree,
            assume="data" if plan.assume == "data" else "gaussian",
            refit=plan.refit,
            tail_weight=plan.tail,
            tail_width=plan.tail_width,
            guard=native and degree == 2,
            units=plan.units,
        )

    def batches(self) -> list[dict[str, Any]]:
        """The calibration inputs where the model is, as its forward passes take them."""
        cache = {"use_cache": False} if self.model.can_generate() else {}
        device = on_disk.device_of(self.model)
        return [{**{name: value.to(device) for name, value in batch.items()}, **cache} for batch in self.data.batches]

    def like(self) -> Tensor:
        """A tensor of the precision and in the place of the model's computations."""
        return torch.empty(0, dtype=next(self.model.parameters()).dtype, device=on_disk.device_of(self.model))

    def originals(self) -> dict[str, Any]:
        return {path: attribute(self.model, path) for block in self.blocks for path in block.replaced}


@dataclass(frozen=True)
class Replaced:
    """Per block: its entry in `polynomial_blocks`, and its row in the report; and what the twin makes of the probe."""

    entries: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    outcome: Any = None


def replace_blocks(
    task: Task,
    native: bool,
    workshop: Workshop,
    degrees: Mapping[str, int] | None = None,
    probe: Mapping[str, Tensor] | None = None,
) -> Replaced:
    """Fits and installs one block after another; use it inside :func:`unchanged_on_error`.

    Args:
        degrees: by path, where they are not all the recipe's.
        probe: inputs whose outputs are wanted of the twin, where new modules are not to stay in memory.
    """
    model, blocks = task.model, task.blocks
    once, repeated = shared.split(blocks)
    like = task.like()
    done = Replaced([], [])
    follow = task.plan.refit and task.plan.target == "stream" and any(block.additive for block in once)
    aside = None if probe is None else workshop.folder
    finished = group.agreed(workshop.finished(blocks))
    passed = [] if len(finished) == len(blocks) else task.batches()  # nothing is left to calibrate, so nothing runs
    with (
        Stream(model, passed, once, follow, task.first_is_sink, probe, aside) as stream,
        Progress(len(blocks), task.quiet or not group.first()) as progress,
    ):
        for station in chain(stream, (shared.station(block, stream) for block in repeated)):
            if station.block.path in finished:
                entry, row, modules = workshop.load(station.block, like)
                stream.replace(modules)
            else:
                entry, row = _replace(stream, station, task, native, degrees or {}, workshop)
            done.entries.append(entry)
            done.rows.append(row)
            progress.step(row)
            del station  # what waits at this block, before the next ones' arrive
    return replace(done, outcome=stream.outcome)


def _replace(
    stream: Stream, station: Station, task: Task, native: bool, degrees: Mapping[str, int], workshop: Workshop
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fits one block and puts its replacement in; its entry and its row."""
    block, begun = station.block, time.monotonic()
    fitted = fit(station, task.settings(degrees.get(block.path, task.plan.degree), native), task.given.get(block.path))
    modules = swap.modules_for(fitted, native, task.like())
    stream.replace(modules)
    if isinstance(fitted, FittedBlock) and block.kind != "plain" and block.calls == 1:  # plain ones wait inside
        for number, output in enumerate(fitted.outputs):
            stream.answer(number, output)
        for number, output in enumerate(fitted.written):
            stream.answer(number, output, original=True)
    entry, row = swap.describe(fitted, native), block_row(fitted, time.monotonic() - begun)
    if group.first():
        workshop.keep(block, entry, row, modules)
    return entry, row


def fit(station: Station, settings: FitSettings, given: Gaussian | None = None) -> FittedBlock | FittedExperts:
    """One block's polynomial, or its experts'. Raises CalibrationError where there is none."""
    with on_disk.in_memory(station.modules.values()):
        try:
            return _fit(station, settings, given)
        except LinAlgError as error:
            raise CalibrationError(
                f"the normal equations have no solution ({error})",
                where=station.block.path,
                cause="values too large for the precision the model computes in, or tokens all alike",
                fix="load it with --dtype float32, give other calibration text, or a lower degree",
            ) from error


def _fit(station: Station, settings: FitSettings, given: Gaussian | None) -> FittedBlock | FittedExperts:
    if station.block.kind == "experts":
        return fit_experts(station, settings)
    return fit_block(station, settings, given, CACHE_BYTES if station.block.calls == 1 else 0)


def put_back(model: Any, originals: Mapping[str, Any]) -> None:
    for path, module in originals.items():
        install(model, path, module)


@contextmanager
def unchanged_on_error(task: Task) -> Iterator[None]:
    """On any error inside, the model is as it was before: its blocks, its configuration and its class."""
    model = task.model
    originals, kind, config, settings = task.originals(), type(model), model.config, dict(vars(model.config))
    try:
        yield
    except BaseException:
        put_back(model, originals)
        model.__class__ = kind
        swap.set_config(model, config)
        vars(config).clear()
        vars(config).update(settings)
        raise
