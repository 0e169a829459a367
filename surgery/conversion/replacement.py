"""Fits and installs the blocks, one after another, while the calibration passes wait."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor

from surgery.calibration.arrivals import Station
from surgery.calibration.passes import Passes
from surgery.calibration.repeated import repeated_arrivals, repeated_station, split_repeated
from surgery.conversion.partial_run import PartialRun
from surgery.conversion.task import ConversionTask, Replacements
from surgery.fitting.either import fit
from surgery.runtime import processes
from surgery.runtime.progress import Progress
from surgery.saving.modules import modules_for

ROUNDS = 3  # of fitting a block that several layers share to what it receives with its polynomial in its place


def replace_blocks(
    task: ConversionTask,
    form: str,
    partial: PartialRun,
    degrees: Mapping[str, int] | None = None,
    probe: Mapping[str, Tensor] | None = None,
) -> Replacements:
    """Fits and installs one block after another; use it inside :func:`surgery.conversion.task.unchanged_on_error`.

    Args:
        degrees: by path, where they are not all the recipe's.
        probe: inputs whose outputs are wanted of the twin, where new modules are not to stay in memory.
    """
    model, blocks = task.model, task.blocks
    once, repeated = split_repeated(blocks)
    like = task.like()
    done = Replacements([], [])
    follow = task.plan.refit and task.plan.target == "stream" and any(block.residual for block in blocks)
    spill = None if probe is None else partial.folder
    finished = processes.from_first(partial.finished(blocks))
    passed = [] if len(finished) == len(blocks) else task.batches()  # nothing is left to calibrate, so nothing runs
    with (
        Passes(model, passed, once, follow, task.first_is_sink, probe, spill, task.plan.matmul) as passes,
        Progress(len(blocks), task.quiet or not processes.first()) as progress,
    ):
        unfinished = [block for block in repeated if follow and block.path not in finished]
        original = {block.path: repeated_arrivals(block, passes) for block in unfinished}
        for station in chain(
            passes, (repeated_station(block, passes, original.pop(block.path, ())) for block in repeated)
        ):
            if station.block.path in finished:
                entry, row, modules = partial.load(station.block, like)
                passes.replace(modules)
            else:
                entry, row = _replace(passes, station, task, form, degrees or {}, partial)
            done.entries.append(entry)
            done.rows.append(row)
            progress.step(row)
            del station  # what waits at this block, before the next ones' arrive
    return replace(done, outcome=passes.outcome)


def _replace(
    passes: Passes,
    station: Station,
    task: ConversionTask,
    form: str,
    degrees: Mapping[str, int],
    partial: PartialRun,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fits one block and puts its replacement in; its entry and its row."""
    block, begun = station.block, time.monotonic()
    settings = task.settings(degrees.get(block.path, task.plan.degree), form)
    for round_ in range(ROUNDS if block.calls > 1 and station.original else 1):
        if round_:
            station = replace(station, twin=repeated_arrivals(block, passes))
        fitted = fit(station, settings, task.given.get(block.path))
        entry, modules = modules_for(fitted, form, task.like())
        passes.replace(modules)
    for number, output in enumerate(fitted.outputs):  # none of blocks inside which the passes wait
        passes.supply(number, output)
    for number, output in enumerate(fitted.written):
        passes.supply(number, output, original=True)
    row = fitted.row(time.monotonic() - begun)
    if processes.first():
        partial.keep(block, entry, row, modules)
    return entry, row
