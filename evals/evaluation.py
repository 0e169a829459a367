"""The whole evaluation in one place: load both → text → blocks → tasks → speed → report.

Every process runs the same story on its share of the documents; the first one gathers, keeps and reports.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from evals import harness, speed
from evals.block_fidelity import AFFINE_RIDGES, BlockSums, block_rows, block_sums
from evals.fidelity import TokenFidelity, compare_outputs, compare_tokens, outputs_summary, summary
from evals.memo import Memo, model_fingerprint
from evals.report import write_evaluation
from evals.settings import EvalSettings, plan_evaluation
from evals.text import MeasuredText, batches, read
from surgery.blocks.find import survey
from surgery.calibration.inputs import calibration_inputs
from surgery.errors import EvaluationError
from surgery.models import loading
from surgery.runtime import processes, weights_on_disk
from surgery.runtime.stopwatch import Stopwatch
from surgery.saving.report import read_report, versions

FORMAT = 1
CHUNK_WINDOWS = 64  # windows per kept piece: what a kill can cost


@dataclass(frozen=True)
class _Pair:
    """Both models; whether they predict next tokens; their fingerprints."""

    original: loading.LoadedModel
    twin: loading.LoadedModel
    causal: bool
    keys: dict[str, str]


def evaluate(
    twin: str | Path,
    *,
    against: str | Path | None = None,
    output: str | Path | None = None,
    cache: str | Path | None = None,
    quiet: bool = True,
    **settings: Any,
) -> dict[str, Any] | None:
    """Measures a twin against its original: perplexity, fidelity, R² per block, lm-eval tasks, speed.

    Under a launcher (accelerate, torchrun) every process must call it and measures its share.

    Args:
        twin, against: Hub ids, folders or .gguf files; `against` is by default what the twin was made from.
        output: folder for evaluation.json, summary.md, report.html and blocks.png.
        cache: folder in which finished measurements are kept and looked up; None keeps nothing.
        settings: as in :func:`evals.settings.plan_evaluation`.
    Returns:
        what evaluation.json holds (losses in nats per token); None on every process but the first.
    Raises:
        SurgeryError: a mistake that can be mended, among them models whose tokenizers differ and too little text.
    """
    planned = plan_evaluation(twin, against=against, output=output, **settings)
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
        pair = _guarded(lambda: _load(settings), "--dtype bfloat16, or --device-map auto or disk")
        if tasks and not pair.causal:
            raise EvaluationError(
                "lm-eval tasks need a causal language model", where=settings.twin, fix="leave --tasks out"
            )
        text = _read(settings, pair) if pair.causal else None
    report: dict[str, Any] = {"format": FORMAT}

    def stage(name: str, measured: Callable[[], Any]) -> None:
        with watch.timing(name):
            report[name] = measured()

    if text is not None:
        stage("text", lambda: _text(settings, pair, text, memo, quiet))
    else:
        stage("outputs", lambda: _outputs(settings, pair))
    if settings.block_tokens:
        stage("blocks", lambda: _blocks(settings, pair, text, memo))
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


def _load(settings: EvalSettings) -> _Pair:
    place: Any = weights_on_disk.ON_DISK if settings.device_map == "disk" else settings.device_map
    options: dict[str, Any] = {"dtype": settings.dtype, "device_map": place}
    original = loading.loaded(settings.original, settings.original_revision, **options)
    twin = loading.loaded(settings.twin, settings.revision, **options)
    models: list[Any] = [original.model, twin.model]
    causal = all(map(loading.is_causal, models))
    if settings.device_map is None and torch.cuda.is_available():
        for model in models:
            model.to("cuda")  # the process's own: accelerate has chosen it
    one, two = original.tokenizer, twin.tokenizer
    if one is not None and two is not None and one.get_vocab() != two.get_vocab():
        raise EvaluationError(
            "the two models have different tokenizers, so their predictions cannot be compared token by token",
            where=f"{settings.twin} and {settings.original}",
            cause="the twin was made from another model",
            fix="name the model that the twin was converted from with --against",
        )
    keys = {
        "original": model_fingerprint(settings.original, original.source.revision),
        "twin": model_fingerprint(settings.twin, twin.source.revision),
    }
    return _Pair(original, twin, causal, keys)


def _read(settings: EvalSettings, pair: _Pair) -> MeasuredText:
    tokenizer = pair.original.tokenizer or pair.twin.tokenizer or pair.original.text_tokenizer
    network: Any = pair.original.model
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None) or settings.window
    where: dict[str, Any] = {"tokens": settings.tokens, "stride": settings.stride, "skip": settings.skip}
    return read(settings.text, tokenizer, length=min(settings.window, limit), **where)


def _text(settings: EvalSettings, pair: _Pair, text: MeasuredText, memo: Memo, quiet: bool) -> dict[str, Any] | None:
    from tqdm import tqdm

    first, second = pair.original.model, pair.twin.model
    chunks = text.windows.split(CHUNK_WINDOWS)
    parts = []
    with tqdm(total=len(text.windows), desc="text", unit="window", disable=quiet or not processes.first()) as bar:
        for number, windows in enumerate(chunks):
            key = [pair.keys, settings.dtype, text.fingerprint, text.length, text.stride, CHUNK_WINDOWS, number]
            kept = processes.looked_up(partial(memo.find, "text", key))
            if kept is not None:
                parts.append(TokenFidelity(**{name: torch.tensor(value) for name, value in kept.items()}))
                bar.update(len(windows))
            else:
                mine = []
                own: Any = processes.own_part(windows)[1]
                for part in own.split(settings.batch) if len(own) else ():
                    mine.append(_guarded(partial(compare_tokens, first, second, part)))
                    bar.update(len(part) * processes.count())
                shares = processes.gather_to_first(mine)
                if shares is not None:
                    whole = TokenFidelity.join([part for share in shares for part in share])
                    memo.keep("text", key, {name: value.tolist() for name, value in vars(whole).items()})
                    parts.append(whole)
    if not processes.first():
        return None
    return summary(TokenFidelity.join(parts), text, pair.original.tokenizer, settings.seed)


def _guarded(measure: Callable[[], Any], fix: str = "lower --batch or --window, or use --dtype bfloat16") -> Any:
    try:
        return measure()
    except torch.cuda.OutOfMemoryError as error:
        raise EvaluationError("the device is out of memory", fix=fix) from error


def _inputs(settings: EvalSettings, pair: _Pair, tokens: int) -> list[dict[str, torch.Tensor]]:
    much = {"tokens": tokens, "length": settings.window, "batch": settings.batch, "seed": settings.seed}
    data = calibration_inputs(settings.text, pair.original.model, pair.original.tokenizer, **much)
    return list(data.batches)


def _outputs(settings: EvalSettings, pair: _Pair) -> dict[str, Any] | None:
    first, second = pair.original.model, pair.twin.model
    _, batches_here = processes.own_part(_inputs(settings, pair, settings.tokens))
    mine = [compare_outputs(first, second, batch) for batch in batches_here]
    shares = processes.gather_to_first(mine)
    return None if shares is None else outputs_summary([part for share in shares for part in share])


def _blocks(settings: EvalSettings, pair: _Pair, text: MeasuredText | None, memo: Memo) -> list[dict[str, Any]] | None:
    first, second = pair.original.model, pair.twin.model
    listed = _converted_paths(settings.twin)
    blocks = [block for block in survey(first).blocks if listed is None or block.path in listed]
    if not blocks:
        return [] if processes.first() else None
    data = settings.text if text is None else text.fingerprint
    key = [pair.keys, settings.dtype, data, settings.window, settings.stride, settings.block_tokens, settings.batch]
    key += [AFFINE_RIDGES]
    kept = processes.looked_up(lambda: memo.find("blocks", [*key, settings.seed]))
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
    shares = processes.gather_to_first(_guarded(lambda: block_sums(first, second, blocks, own, begin)))
    if shares is None:
        return None
    total: dict[str, BlockSums] = shares[0]
    for share in shares[1:]:
        total = {path: sums + share[path] for path, sums in total.items()}
    found = block_rows(first, second, blocks, total, settings.seed)
    memo.keep("blocks", [*key, settings.seed], found)
    return found


def _converted_paths(twin: str) -> set[str] | None:
    try:
        return {row["path"] for row in read_report(twin)["blocks"]}
    except (OSError, KeyError, ValueError):
        return None


def _tasks(
    settings: EvalSettings, pair: _Pair, tasks: list[str], manager: Any, memo: Memo, quiet: bool
) -> list[dict[str, Any]]:
    from tqdm import tqdm

    results: dict[tuple[str, str], harness.TaskResult] = {}
    documents: dict[str, list[int]] = {}
    with tqdm(total=2 * len(tasks), desc="tasks", disable=quiet or not processes.first()) as bar:
        for name, loaded in (("original", pair.original), ("twin", pair.twin)):
            lm = harness.language_model(loaded.model, loaded.tokenizer, settings.task_settings)
            for task in tasks:
                bar.set_postfix_str(f"{task}, {name}")
                key = [pair.keys[name], settings.dtype, task, asdict(settings.task_settings), _versions()]
                kept = processes.looked_up(partial(memo.find, f"{task} ({name})", key))
                if kept is None:
                    run = partial(harness.run_task, lm, task, manager, settings.task_settings)
                    found = _guarded(run, "lower --task-batch or --max-length, or use --dtype bfloat16")
                    if found is not None:
                        memo.keep(f"{task} ({name})", key, found.as_dict())
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


def _speed(settings: EvalSettings, pair: _Pair) -> dict[str, Any] | None:
    if not processes.first():
        return None
    found = speed.compare_speed(pair.original.model, pair.twin.model, settings.seed)
    found["weight_bytes"] = {name: speed.weight_bytes(getattr(settings, name)) for name in ("original", "twin")}
    return found


def _models(settings: EvalSettings, pair: _Pair) -> dict[str, Any]:
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
