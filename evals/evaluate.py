"""The whole evaluation in one place: load both → text → blocks → tasks → speed → report.

Every process runs the same story on its share of the documents; the first one gathers, keeps and reports.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from evals import harness, speed
from evals.blocks import AFFINE_RIDGES, BlockSums, block_rows, block_sums
from evals.fidelity import TokenFidelity, compare_outputs, compare_tokens, outputs_summary, summary
from evals.memo import Memo, fingerprint
from evals.processes import Processes
from evals.text import EvaluationError, Text, batches, read
from surgery import loading, on_disk
from surgery.blocks import survey
from surgery.report import read_report
from surgery.texts import label

FORMAT = 1
CHUNK_WINDOWS = 64  # windows per kept piece: what a kill can cost


@dataclass(frozen=True)
class EvalSettings:
    """What `surgery eval` measures; the options of the same names.

    Attributes:
        twin, original: Hub ids, folders or .gguf files.
        text: a text source (see :mod:`surgery.calibration`); model inputs (.safetensors) for models without tokens.
        tokens, window, stride, batch: how much of it, in windows of how many tokens, and windows a forward pass.
        block_tokens: tokens for the R² of the blocks, whose sums take 4 · width² numbers a block; 0 to leave it out.
        tasks: lm-eval tasks by name.
        device_map: `auto` spreads a model over several devices; `disk` leaves the weights of both on disk, each read
            when it is used, for models larger than memory.
    """

    twin: str
    original: str
    text: str = "python"
    tokens: int = 16384
    window: int = 512
    stride: int | None = None
    skip: int = 0
    batch: int = 4
    block_tokens: int = 4096
    tasks: tuple[str, ...] = ()
    task_settings: harness.TaskSettings = field(default_factory=harness.TaskSettings)
    speed: bool = True
    dtype: str = "float32"
    device_map: str | None = None
    revision: str | None = None
    original_revision: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Pair:
    """Both models; whether they predict next tokens; their fingerprints."""

    original: loading.LoadedModel
    twin: loading.LoadedModel
    causal: bool
    keys: dict[str, str]


def evaluate(settings: EvalSettings, memo: Memo, processes: Processes, quiet: bool = True) -> dict[str, Any] | None:
    """Measures the twin against the original; the report on the first process, None on the others.

    Raises:
        SurgeryError: a mistake that can be mended, among them models whose tokenizers differ and too little text.
    """
    started = time.monotonic()
    manager = harness.task_manager(settings.task_settings.include_path) if settings.tasks else None
    tasks = harness.resolve_tasks(manager, settings.tasks) if manager else []
    pair = _guarded(lambda: _load(settings), "--dtype bfloat16, or --device-map auto or disk")
    if tasks and not pair.causal:
        raise EvaluationError(
            "lm-eval tasks need a causal language model", where=settings.twin, fix="leave --tasks out"
        )
    text = _read(settings, pair) if pair.causal else None
    seconds = {"load": round(time.monotonic() - started, 2)}
    report: dict[str, Any] = {"format": FORMAT}

    def stage(name: str, measure: Callable[[], Any]) -> None:
        begun = time.monotonic()
        report[name] = measure()
        seconds[name] = round(time.monotonic() - begun, 2)

    if text is not None:
        stage("text", lambda: _text(settings, pair, text, memo, processes, quiet))
    else:
        stage("outputs", lambda: _outputs(settings, pair, processes))
    if settings.block_tokens:
        stage("blocks", lambda: _blocks(settings, pair, text, memo, processes))
    if tasks:
        stage("tasks", lambda: _tasks(settings, pair, tasks, manager, memo, processes, quiet))
    if settings.speed and pair.causal and settings.device_map != "disk":
        stage("speed", lambda: _speed(settings, pair, processes))
    if not processes.first:
        return None
    return report | {
        "settings": asdict(settings) | {"processes": processes.count},
        "models": _models(settings, pair),
        "reused": sorted(set(memo.reused)),
        "seconds": seconds,
        "versions": _versions(),
    }


def _load(settings: EvalSettings) -> _Pair:
    place: Any = on_disk.ON_DISK if settings.device_map == "disk" else settings.device_map
    options: dict[str, Any] = {"dtype": settings.dtype, "device_map": place}
    original = loading.load(settings.original, settings.original_revision, **options)
    twin = loading.load(settings.twin, settings.revision, **options)
    models: list[Any] = [original.model, twin.model]
    causal = all(model.can_generate() and not getattr(model.config, "is_encoder_decoder", False) for model in models)
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
        "original": fingerprint(settings.original, original.source.revision),
        "twin": fingerprint(settings.twin, twin.source.revision),
    }
    return _Pair(original, twin, causal, keys)


def _read(settings: EvalSettings, pair: _Pair) -> Text:
    tokenizer = pair.original.tokenizer or pair.twin.tokenizer
    network: Any = pair.original.model
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None) or settings.window
    return read(
        settings.text, tokenizer, tokens=settings.tokens, length=min(settings.window, limit), stride=settings.stride,
        skip=settings.skip,
    )  # fmt: skip


def _text(
    settings: EvalSettings, pair: _Pair, text: Text, memo: Memo, processes: Processes, quiet: bool
) -> dict[str, Any] | None:
    from tqdm import tqdm

    first, second = pair.original.model, pair.twin.model
    chunks = text.windows.split(CHUNK_WINDOWS)
    parts = []
    with tqdm(total=len(text.windows), desc="text", unit="window", disable=quiet or not processes.first) as bar:
        for number, windows in enumerate(chunks):
            key = [pair.keys, settings.dtype, text.fingerprint, text.length, text.stride, CHUNK_WINDOWS, number]
            kept = processes.agree(memo.find("text", key) if processes.first else None)
            if kept is not None:
                parts.append(TokenFidelity(**{name: torch.tensor(value) for name, value in kept.items()}))
                bar.update(len(windows))
            else:
                mine = []
                for part in processes.share(windows).split(settings.batch):
                    mine.append(_guarded(partial(compare_tokens, first, second, part)))
                    bar.update(len(part) * processes.count)
                shares = processes.gather(TokenFidelity.join(mine) if mine else None)
                if processes.first:
                    whole = _interleaved([share for share in shares if share is not None])
                    memo.keep("text", key, {name: value.tolist() for name, value in vars(whole).items()})
                    parts.append(whole)
    if not processes.first:
        return None
    return summary(TokenFidelity.join(parts), text, pair.original.tokenizer, settings.seed)


def _interleaved(shares: list[TokenFidelity]) -> TokenFidelity:
    """Rows back in the order of the windows: row i of process r is window i · count + r."""
    joined = {}
    for name in vars(shares[0]):
        pieces = [getattr(share, name) for share in shares]
        rows = [piece[index] for index in range(max(map(len, pieces))) for piece in pieces if index < len(piece)]
        joined[name] = torch.stack(rows)
    return TokenFidelity(**joined)


def _guarded(measure: Callable[[], Any], fix: str = "lower --batch or --window, or use --dtype bfloat16") -> Any:
    try:
        return measure()
    except torch.cuda.OutOfMemoryError as error:
        raise EvaluationError("the device is out of memory", fix=fix) from error


def _inputs(settings: EvalSettings, pair: _Pair, tokens: int) -> list[dict[str, torch.Tensor]]:
    from surgery.calibration import prepare

    data = prepare(
        settings.text, pair.original.model, pair.original.tokenizer,
        tokens=tokens, length=settings.window, batch=settings.batch, seed=settings.seed,
    )  # fmt: skip
    return list(data.batches)


def _outputs(settings: EvalSettings, pair: _Pair, processes: Processes) -> dict[str, Any] | None:
    first, second = pair.original.model, pair.twin.model
    mine = [
        compare_outputs(first, second, batch) for batch in processes.share(_inputs(settings, pair, settings.tokens))
    ]
    shares = [part for share in processes.gather(mine) for part in share or ()]
    return outputs_summary(shares) if processes.first else None


def _blocks(
    settings: EvalSettings, pair: _Pair, text: Text | None, memo: Memo, processes: Processes
) -> list[dict[str, Any]] | None:
    first, second = pair.original.model, pair.twin.model
    listed = _converted(settings.twin)
    blocks = [block for block in survey(first).blocks if listed is None or block.path in listed]
    if not blocks:
        return [] if processes.first else None
    data = settings.text if text is None else text.fingerprint
    key = [pair.keys, settings.dtype, data, settings.window, settings.stride, settings.block_tokens, settings.batch]
    key += [AFFINE_RIDGES]
    kept = processes.agree(memo.find("blocks", [*key, settings.seed]) if processes.first else None)
    if kept is not None:
        return list(kept)
    if text is not None:
        rows = max(2, settings.block_tokens // text.length)
        spread = text.windows[:: max(1, len(text.windows) // rows)][:rows]
        inputs = list(batches(spread, min(settings.batch, max(1, len(spread) // (2 * processes.count)))))
    else:
        inputs = _inputs(settings, pair, settings.block_tokens)
    shares = processes.gather(_guarded(lambda: block_sums(first, second, blocks, processes.share(inputs))))
    if not processes.first:
        return None
    total: dict[str, BlockSums] = shares[0]
    for share in shares[1:]:
        total = {path: sums + share[path] for path, sums in total.items()}
    found = block_rows(first, second, blocks, total, settings.seed)
    memo.keep("blocks", [*key, settings.seed], found)
    return found


def _converted(twin: str) -> set[str] | None:
    try:
        return {row["path"] for row in read_report(twin)["blocks"]}
    except (OSError, KeyError, ValueError):
        return None


def _tasks(
    settings: EvalSettings, pair: _Pair, tasks: list[str], manager: Any, memo: Memo, processes: Processes, quiet: bool
) -> list[dict[str, Any]]:
    from tqdm import tqdm

    results: dict[tuple[str, str], harness.TaskResult] = {}
    documents: dict[str, list[int]] = {}
    with tqdm(total=2 * len(tasks), desc="tasks", disable=quiet or not processes.first) as bar:
        for name, loaded in (("original", pair.original), ("twin", pair.twin)):
            lm = harness.language_model(loaded.model, loaded.tokenizer, settings.task_settings, processes.accelerator)
            for task in tasks:
                bar.set_postfix_str(f"{task}, {name}")
                key = [pair.keys[name], settings.dtype, task, asdict(settings.task_settings), _versions()]
                kept = processes.agree(memo.find(f"{task} ({name})", key) if processes.first else None)
                if kept is None:
                    run = partial(harness.run_task, lm, task, manager, settings.task_settings)
                    found = _guarded(run, "lower --task-batch or --max-length, or use --dtype bfloat16")
                    if found is not None:
                        memo.keep(f"{task} ({name})", key, found.as_dict())
                        results[name, task] = found
                else:
                    results[name, task] = harness.TaskResult(**kept)
                bar.update(1)
    if not processes.first:
        return []
    rows = []
    for task in tasks:
        documents[task] = results["twin", task].documents
        for row in harness.compared(results["original", task], results["twin", task]):
            rows.append(row | {"documents_per_process": documents[task], "version": results["twin", task].version})
    return rows


def _speed(settings: EvalSettings, pair: _Pair, processes: Processes) -> dict[str, Any] | None:
    if not processes.first:
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
            "degree": made["recipe"]["degree"], "assume": made["recipe"]["assume"], "form": made["form"],
            "source": made["source"], "calibration": made["calibration"],
            "refined_on": (made.get("refinement") or {}).get("held_out"),
        }  # fmt: skip
    except (OSError, KeyError, ValueError):
        described["twin"]["conversion"] = None
    return described


def _versions() -> dict[str, str]:
    from importlib import metadata

    import transformers

    from surgery import __version__

    versions = {"polysurgery": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["lm_eval"] = metadata.version("lm_eval")
    return versions | {"python": platform.python_version(), "platform": sys.platform}


def unseen(twin: str, text: str) -> tuple[int, int | None]:
    """(first token of this text that neither fit nor refinement saw, how many there are; None: all that follow)."""
    try:
        made = read_report(twin)
    except (OSError, KeyError, ValueError):
        return 0, None
    refined = (made.get("refinement") or {}).get("held_out", {})
    kept = refined.get(label(text))
    if kept:
        return kept["begin"], kept["end"] - kept["begin"]
    used = made["calibration"]
    return (int(used["tokens"]) if label(used["source"]) == label(text) else 0), None


def default_original(twin: str) -> str:
    """What the twin says it was converted from. Raises EvaluationError where that cannot be loaded from here."""
    try:
        source = read_report(twin)["source"]
    except (OSError, KeyError, ValueError):
        source = None
    if source and source["kind"] == "hub":
        return str(source["name"])
    raise EvaluationError(
        "the original is not named",
        where=twin,
        cause=f"the twin was made from {source['name']!r}, which is not on the Hub"
        if source
        else "not a twin's folder",
        fix="give --against MODEL",
    )
