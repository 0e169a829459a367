"""The whole evaluation in one place: load both → text → blocks → tasks → speed → report.

Every process runs the same story on its share of the documents; the first one gathers, keeps and reports.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from evals import harness, speed
from evals.block_fidelity import AFFINE_RIDGES, GAUSSIAN_TOKENS, BlockSums, block_rows, block_sums
from evals.fidelity import compare_outputs, outputs_summary, summary
from evals.kinds import compare_kinds
from evals.memo import Memo
from evals.pair import Pair, guarded, load_pair, token_fidelity
from evals.report import write_evaluation
from evals.settings import EvalSettings, plan_evaluation
from evals.text import MeasuredText, batches, read
from surgery.blocks.find import survey
from surgery.calibration.inputs import calibration_inputs
from surgery.errors import EvaluationError
from surgery.runtime import processes
from surgery.runtime.progress import progress
from surgery.runtime.stopwatch import Stopwatch
from surgery.runtime.vocabulary import understands_former_names
from surgery.saving.report import read_report, versions

FORMAT = 1


@understands_former_names
def evaluate(
    twin: str | Path,
    *,
    original: str | Path | None = None,
    output: str | Path | None = None,
    cache: str | Path | None = None,
    quiet: bool = True,
    **settings: Any,
) -> dict[str, Any] | None:
    """Measures a twin against its original: perplexity, fidelity, R² per block, lm-eval tasks, speed.

    Under a launcher (accelerate, torchrun) every process must call it and measures its share.

    Args:
        twin, original: Hub ids, folders or .gguf files; the original is by default what the twin was made from.
        output: folder for evaluation.json, summary.md, report.html and blocks.png.
        cache: folder in which finished measurements are kept and looked up; None keeps nothing.
        settings: as in :func:`evals.settings.plan_evaluation`.
    Returns:
        what evaluation.json holds (losses in nats per token); None on every process but the first.
    Raises:
        SurgeryError: a mistake that can be mended, among them models whose tokenizers differ and too little text.
    """
    planned = plan_evaluation(twin, original=original, output=output, **settings)
    return evaluated(planned, output, cache, quiet)


def evaluated(
    settings: EvalSettings, output: str | Path | None, cache: str | Path | None = None, quiet: bool = True
) -> dict[str, Any] | None:
    """What :func:`evaluate` does, for settings that were checked."""
    processes.join()
    found = measure(settings, Memo(None if cache is None else Path(cache).expanduser()), quiet)
    if found is not None and output is not None:
        write_evaluation(found, Path(output))
    return found


def measure(settings: EvalSettings, memo: Memo, quiet: bool = True) -> dict[str, Any] | None:
    """The report itself, on the first process."""
    watch = Stopwatch()
    with watch.timing("load"):
        manager = harness.task_manager(settings.task_settings.include_path) if settings.tasks else None
        tasks = harness.resolve_tasks(manager, settings.tasks) if manager else []
        pair = guarded(lambda: _load(settings), "--dtype bfloat16, or --device-map auto or disk")
        if tasks and not pair.causal:
            raise EvaluationError(
                "lm-eval tasks need a causal language model", where=settings.twin, fix="leave --tasks out"
            )
        if settings.kind and not pair.causal:
            raise EvaluationError("kinds of text need a causal language model", where=settings.twin, fix="leave --kind")
        text = _read(settings, pair) if pair.causal else None
    report: dict[str, Any] = {"format": FORMAT}

    def stage(name: str, measured: Callable[[], Any]) -> None:
        with watch.timing(name):
            report[name] = measured()

    if text is not None:
        stage("text", lambda: _text(settings, pair, text, memo, quiet))
    else:
        stage("outputs", lambda: _outputs(settings, pair))
    if settings.kind:
        stage("kinds", lambda: _kinds(settings, pair, memo, quiet))
    if settings.block_tokens:
        stage("blocks", lambda: _blocks(settings, pair, text, memo, quiet))
    if tasks:
        stage("tasks", lambda: _tasks(settings, pair, tasks, manager, memo, quiet))
    if settings.speed and pair.causal and settings.device_map != "disk":
        stage("speed", lambda: _speed(settings, pair))
    if not processes.first():
        return None
    return report | {
        "settings": asdict(settings) | {"processes": processes.count()},
        "models": _models(settings, pair),
        "reused": sorted(set(memo.reused)),
        "seconds": watch.seconds,
        "versions": _versions(),
    }


def _load(settings: EvalSettings) -> Pair:
    names = ("revision", "original_revision", "dtype", "device", "device_map")
    return load_pair(settings.twin, settings.original, **{name: getattr(settings, name) for name in names})


def _read(settings: EvalSettings, pair: Pair) -> MeasuredText:
    where: dict[str, Any] = {"tokens": settings.tokens, "stride": settings.stride, "skip": settings.skip}
    return read(settings.text, pair.tokenizer, length=pair.window(settings.window), **where)


def _text(settings: EvalSettings, pair: Pair, text: MeasuredText, memo: Memo, quiet: bool) -> dict[str, Any] | None:
    with progress(len(text.windows), "text", quiet or not processes.first()) as bar:
        found = token_fidelity(pair, text, settings.batch, memo, "text", bar)
    return None if found is None else summary(found, text, pair.original.tokenizer, settings.seed)


def _kinds(settings: EvalSettings, pair: Pair, memo: Memo, quiet: bool) -> dict[str, Any] | None:
    much: dict[str, Any] = {"tokens": settings.kind_tokens, "window": settings.window, "batch": settings.batch}
    how: dict[str, Any] = {
        "seen": settings.seen,
        "unseen_by": settings.unseen_by,
        "seed": settings.seed,
        "memo": memo,
        "quiet": quiet,
    }
    return compare_kinds(pair, settings.twin, dict(settings.kind), **much, **how)


def _inputs(settings: EvalSettings, pair: Pair, tokens: int) -> list[dict[str, torch.Tensor]]:
    much = {"tokens": tokens, "length": settings.window, "batch": settings.batch, "seed": settings.seed}
    data = calibration_inputs(settings.text, pair.original.model, pair.original.tokenizer, **much)
    return list(data.batches)


def _outputs(settings: EvalSettings, pair: Pair) -> dict[str, Any] | None:
    first, second = pair.original.model, pair.twin.model
    _, batches_here = processes.own_part(_inputs(settings, pair, settings.tokens))
    mine = [compare_outputs(first, second, batch) for batch in batches_here]
    shares = processes.gather_to_first(mine)
    return None if shares is None else outputs_summary([part for share in shares for part in share])


def _blocks(
    settings: EvalSettings, pair: Pair, text: MeasuredText | None, memo: Memo, quiet: bool
) -> list[dict[str, Any]] | None:
    first, second = pair.original.model, pair.twin.model
    listed = _converted_paths(settings.twin)
    blocks = [block for block in survey(first).blocks if listed is None or block.path in listed]
    if not blocks:
        return [] if processes.first() else None
    data = settings.text if text is None else text.fingerprint
    key = ["blocks", pair.keys, pair.dtype, data, settings.window, settings.stride, settings.block_tokens]
    key += [settings.batch, AFFINE_RIDGES, GAUSSIAN_TOKENS, settings.seed]
    kept = processes.looked_up(lambda: memo.find("blocks", key))
    if kept is not None:
        return list(kept)
    if text is not None:
        rows = max(2, settings.block_tokens // text.length)
        spread = text.windows[:: max(1, len(text.windows) // rows)][:rows]
        inputs = list(batches(spread, min(settings.batch, max(1, len(spread) // (2 * processes.count())))))
    else:
        inputs = _inputs(settings, pair, settings.block_tokens)
    number, own = processes.own_part(inputs)
    begin = sum(len(next(iter(batch.values()))) for batch in inputs[:number])
    with progress(len(own), "blocks", quiet or not processes.first()) as bar:
        watched = (batch for batch in own if bar.update(1) or True)
        shares = processes.gather_to_first(guarded(lambda: block_sums(first, second, blocks, watched, begin)))
    if shares is None:
        return None
    total: dict[str, BlockSums] = shares[0]
    for share in shares[1:]:
        total = {path: sums + share[path] for path, sums in total.items()}
    found = block_rows(first, second, blocks, total, settings.seed)
    memo.keep(key, found)
    return found


def _converted_paths(twin: str) -> set[str] | None:
    try:
        return {row["path"] for row in read_report(twin)["blocks"]}
    except (OSError, KeyError, ValueError):
        return None


def _tasks(
    settings: EvalSettings, pair: Pair, tasks: list[str], manager: Any, memo: Memo, quiet: bool
) -> list[dict[str, Any]]:
    results: dict[tuple[str, str], harness.TaskResult] = {}
    documents: dict[str, list[int]] = {}
    with progress(2 * len(tasks), "tasks", quiet or not processes.first()) as bar:
        for name, loaded in (("original", pair.original), ("twin", pair.twin)):
            lm = harness.language_model(loaded.model, loaded.tokenizer, settings.task_settings)
            for task in tasks:
                bar.set_postfix_str(f"{task}, {name}")
                key = ["task", pair.keys[name], pair.dtype, task, asdict(settings.task_settings), _versions()]
                kept = processes.looked_up(partial(memo.find, f"{task} ({name})", key))
                if kept is None:
                    run = partial(harness.run_task, lm, task, manager, settings.task_settings)
                    found = guarded(run, "lower --task-batch or --task-window, or use --dtype bfloat16")
                    if found is not None:
                        memo.keep(key, found.as_dict())
                        results[name, task] = found
                else:
                    results[name, task] = harness.TaskResult(**kept)
                bar.update(1)
    if not processes.first():
        return []
    rows = []
    for task in tasks:
        documents[task] = results["twin", task].documents
        for row in harness.compared(results["original", task], results["twin", task]):
            rows.append(row | {"documents_per_process": documents[task], "version": results["twin", task].version})
    return rows


def _speed(settings: EvalSettings, pair: Pair) -> dict[str, Any] | None:
    if not processes.first():
        return None
    found = speed.compare_speed(pair.original.model, pair.twin.model, settings.seed)
    found["weight_bytes"] = {name: speed.weight_bytes(getattr(settings, name)) for name in ("original", "twin")}
    return found


def _models(settings: EvalSettings, pair: Pair) -> dict[str, Any]:
    described: dict[str, Any] = {
        name: loaded.source.as_dict() | {"fingerprint": pair.keys[name]}
        for name, loaded in (("original", pair.original), ("twin", pair.twin))
    }
    try:
        made = read_report(settings.twin)
        described["twin"]["conversion"] = {
            "degree": made["recipe"]["degree"],
            "assume": made["recipe"]["assume"],
            "form": made["form"],
            "source": made["source"],
            "calibration": made["calibration"],
            "refined_on": (made.get("refinement") or {}).get("held_out"),
        }
    except (OSError, KeyError, ValueError):
        described["twin"]["conversion"] = None
    return described


def _versions() -> dict[str, str]:
    found = versions()
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["lm_eval"] = metadata.version("lm_eval")
    return {**found, "platform": sys.platform}
