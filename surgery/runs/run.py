"""One recipe from model to Hub: convert → refine → eval → card → push, and a page that tells it.

    OUT/degree-N    the converted twins
    OUT/refined     the refined twin
    OUT/run.md, run.html, run.png, run.json    what was done, what it cost, on which texts

What is done already is not done again, so the same command continues after a kill and does little the second time.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from evals.evaluation import evaluate
from evals.harness import resolve_tasks, task_manager
from evals.memo import default_folder
from evals.settings import evaluation_settings
from surgery.conversion.inspection import plan_conversion
from surgery.conversion.pipeline import convert
from surgery.errors import CheckpointError
from surgery.models.loading import placed
from surgery.publishing.card import card
from surgery.publishing.hub import push
from surgery.refining.run import refined
from surgery.refining.settings import check_refinement
from surgery.runs.estimate import Estimate
from surgery.runs.page import TwinResult, draw_picture, next_commands, twins_of, write_pages
from surgery.runs.recipe import RunRecipe, load_run
from surgery.runs.stages import Stage, read_record, reason_to_do, stages_of, write_record
from surgery.runtime import processes
from surgery.runtime.files import cannot_write, not_written
from surgery.runtime.freed_memory import keep_freed_memory
from surgery.runtime.public import printable, public
from surgery.saving.report import read_report


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        folder: of the run; `twin`: the twin that is published, the refined one if there is one.
        record: what run.json holds: every stage with its time and what came out.
        twins: what it made, on the first process; `pages`: the files that tell it.
        next: what to type after it.
    """

    folder: Path
    twin: Path
    record: dict[str, Any]
    twins: tuple[TwinResult, ...]
    pages: tuple[Path, ...]
    next: str


def run(
    recipe: str | Path,
    *,
    sets: Iterable[str] = (),
    output: str | Path | None = None,
    restart: bool = False,
    quiet: bool = True,
) -> RunResult:
    """Does what a recipe says, stage by stage, and writes the page.

    Under a launcher (accelerate, torchrun) every process must call it.

    Args:
        recipe: a YAML file, see :mod:`surgery.runs.recipe`.
        sets: changes to it, as in "convert.degree=3".
        output: folder, instead of the recipe's.
        restart: do every stage again.
    Raises:
        SurgeryError: a recipe that cannot be followed, or whatever a stage raises. What is finished is kept.
    """
    plan = load_run(recipe, sets, output)
    processes.join()
    if problem := cannot_write(_nearest(plan.output)):
        raise not_written(problem, "the run's folder cannot be written", plan.output)
    stages = processes.looked_up(lambda: stages_of(plan))
    record = processes.looked_up(lambda: read_record(plan.output))
    for number, stage in enumerate(stages, 1):
        why = processes.looked_up(partial(reason_to_do, stage, record)) or restart
        _tell(f"[{number}/{len(stages)}] {stage.kind}: {stage.label}" + ("" if why else " (already done)"), quiet)
        if not why:
            continue
        begun = time.monotonic()
        fresh = restart or record["begun"].get(stage.name, stage.key) != stage.key
        if processes.first():
            record["begun"][stage.name] = stage.key
            write_record(plan.output, record)
        came = _done(stage, stages, plan, fresh, quiet)
        if processes.first():
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            seconds = round(time.monotonic() - begun, 1)
            record["stages"][stage.name] = {"key": stage.key, "seconds": seconds, "finished": now, **came}
            write_record(plan.output, record)
    twins: list[TwinResult] = []
    pages: tuple[Path, ...] = ()
    if processes.first():
        names = {stage.name for stage in stages}
        record["stages"] = {name: kept for name, kept in record["stages"].items() if name in names}
        record |= {"recipe": plan.name, "model": public(plan.model), "twin": plan.final.name}
        write_record(plan.output, record)
        twins = twins_of(stages)
        pages = write_pages(plan, stages, record, twins)
    return RunResult(plan.output, plan.final, record, tuple(twins), pages, next_commands(plan))


def _nearest(folder: Path) -> Path:
    """The folder, or the one nearest to it that is there."""
    whole = folder.absolute()
    return next(parent for parent in (whole, *whole.parents) if parent.exists())


def _tell(text: str, quiet: bool) -> None:
    if not quiet and processes.first():
        print(printable(text), file=sys.stderr, flush=True)


def _done(stage: Stage, stages: Sequence[Stage], plan: RunRecipe, fresh: bool, quiet: bool) -> dict[str, Any]:
    """Does one stage; what the record keeps of it. `fresh`: nothing that an interrupted one left is used."""
    if stage.kind == "convert":
        conversion = next(one for one in plan.conversions if one.output == str(stage.twin))
        convert(conversion.model, recipe=conversion, overwrite=True, restart=fresh, quiet=quiet)
        return _made(stage.twin)
    if stage.kind == "refine":
        settings = plan.refinement()
        check_refinement(settings)
        refined(settings, overwrite=True, restart=fresh, quiet=quiet)
        return _made(stage.twin)
    if stage.kind == "eval":
        options = plan.evaluation(stage.twin)
        if placed(plan.device).type == "cpu":
            keep_freed_memory()
        evaluate(stage.twin, output=stage.twin / "evaluation", cache=default_folder(), quiet=quiet, **options)
        return {}
    if not processes.first():
        return {}
    about = plan.card or {}
    names: Mapping[str, Any] = {"base_model": about.get("base_model"), "license": about.get("license")}
    if stage.kind == "card":
        draw_picture(plan, stages)
        return {"missing": list(card(stage.twin, **names).missing)}
    return {"address": push(stage.twin, **names, **(plan.push or {}))}


def _made(twin: Path) -> dict[str, Any]:
    return {"weights": read_report(twin)["verification"]["weights"]} if processes.first() else {}


def plan_run(
    recipe: str | Path, *, sets: Iterable[str] = (), output: str | Path | None = None, restart: bool = False
) -> dict[str, Any]:
    """What :func:`run` would do, without loading weights: `--dry-run`.

    Returns:
        `stages`: name, label, why it would be done (empty where it is done already), seconds (about; None where
        unknown); `bytes` on disk of all twins, `free`, and `memory`, at least.
    """
    plan = load_run(recipe, sets, output)
    for conversion in plan.conversions:
        made_here = (plan.output / "run.json").is_file()
        plan_conversion(conversion, overwrite=made_here)
    if plan.eval is not None and (tasks := evaluation_settings(plan.final, **plan.evaluation(plan.final))).tasks:
        resolve_tasks(task_manager(tasks.task_settings.include_path), tasks.tasks)
    stages = stages_of(plan)
    record, guess = read_record(plan.output), Estimate(plan)
    rows = [
        {
            "stage": stage.kind,
            "label": stage.label,
            "folder": str(stage.twin),
            "why": reason_to_do(stage, record) or ("asked to" if restart else ""),
            "seconds": guess.seconds(stage, plan),
        }
        for stage in stages
    ]
    place = _nearest(plan.output)
    twins = sum(row["stage"] in ("convert", "refine") for row in rows)
    free = shutil.disk_usage(place).free
    kept = guess.kept if any(row["stage"] == "refine" and row["why"] for row in rows) else 0
    if free < guess.bytes + kept:
        what = "a twin, with the predictions kept to refine it," if kept else "a twin"
        raise CheckpointError(
            f"{what} takes {(guess.bytes + kept) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            where=str(place),
            fix="make room, or choose another -o",
        )
    return {
        "recipe": plan.name, "model": plan.model, "output": str(plan.output), "parameters": guess.parameters,
        "stages": rows, "bytes": twins * guess.bytes + kept, "free": free, "memory": guess.memory,
    }  # fmt: skip
