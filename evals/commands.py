"""`surgery eval`: options in, report out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals import harness, report
from evals.evaluate import EvalSettings, default_original, unseen
from evals.evaluate import evaluate as measure
from evals.memo import Memo, default_folder
from evals.processes import Processes, relaunch, started
from evals.text import EvaluationError
from surgery.texts import check_source


def evaluate(
    twin: str,
    nproc: int,
    arguments: Sequence[str],
    *,
    against: str | None,
    output: str | None,
    tasks: str,
    include_path: Sequence[str],
    fewshot: int | None,
    limit: float | None,
    task_batch: int,
    max_length: int,
    cache: str | None,
    no_cache: bool,
    dry_run: bool,
    as_json: bool,
    **rest: Any,
) -> list[str] | int:
    """Lines to print; with several processes still to be started, their exit code.

    Raises:
        SurgeryError: a mistake that can be mended.
    """
    check_source(rest["text"])
    if rest["skip"] is None:
        rest["skip"], most = unseen(twin, rest["text"])
        rest["tokens"] = min(rest["tokens"], most or rest["tokens"])
    settings = EvalSettings(
        twin=twin,
        original=against or default_original(twin),
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        task_settings=harness.TaskSettings(fewshot, limit, task_batch, max_length, rest["seed"], tuple(include_path)),
        **rest,
    )
    if not started():
        check(settings, output)
    if dry_run:
        return _planned(settings, nproc)
    if nproc > 1 and not started():
        return relaunch(nproc, arguments)
    memo = Memo(None if no_cache else Path(cache).expanduser() if cache else default_folder())
    processes = Processes.join()
    try:
        found = measure(settings, memo, processes, quiet=as_json)
    finally:
        processes.leave()
    if found is None:
        return []
    if output:
        report.write(found, Path(output))
    return [json.dumps(found, indent=2)] if as_json else _lines(found, output)


def check(settings: EvalSettings, output: str | None) -> None:
    """Everything that can be wrong before a model is loaded."""
    from surgery.loading import load_config

    for name, revision in ((settings.twin, settings.revision), (settings.original, settings.original_revision)):
        load_config(name, revision)
    if settings.tasks and settings.device_map == "disk":
        raise EvaluationError(
            "lm-eval tasks need the models in memory",
            where="--device-map disk",
            fix="leave --tasks or --device-map out",
        )
    if settings.tasks:
        harness.resolve_tasks(harness.task_manager(settings.task_settings.include_path), settings.tasks)
    if output and Path(output).is_file():
        raise EvaluationError("there is a file of this name", where=output, fix="name a folder")
    if output and (Path(output) / "config.json").exists():
        raise EvaluationError("the folder holds a model", where=output, fix="name another folder for the report")


def _planned(settings: EvalSettings, nproc: int) -> list[str]:
    return [
        f"twin       {settings.twin}",
        f"original   {settings.original}",
        f"text       {settings.text}: {settings.tokens} tokens after {settings.skip}, windows of {settings.window}, "
        f"stride {settings.stride or settings.window}",
        f"blocks     on {settings.block_tokens} tokens",
        f"tasks      {', '.join(settings.tasks) or '(none)'}",
        f"speed      {'yes' if settings.speed else 'no'}",
        f"processes  {nproc}",
    ]


def _lines(found: dict[str, Any], output: str | None) -> list[str]:
    lines = report.markdown(found).splitlines()
    return [*lines, f"{output}: {report.JSON}, {report.MARKDOWN}, {report.PAGE}"] if output else lines
