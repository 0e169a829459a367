"""What `surgery eval` can be told, and what of it can be wrong before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evals import harness
from surgery.calibration.mixtures import seen_of
from surgery.calibration.texts import check_source, label
from surgery.errors import EvaluationError, RecipeError
from surgery.models.loading import load_config
from surgery.runtime.settings import at_least, checked_settings
from surgery.saving.report import read_report, recorded_original


@dataclass(frozen=True)
class EvalSettings:
    """What `surgery eval` measures; the options of the same names.

    Attributes:
        twin, original: Hub ids, folders or .gguf files.
        text: a text source, or model inputs (.safetensors) for models without tokens.
        tokens, window, stride, batch: how much of it, in windows of how many tokens, and windows a forward pass.
        block_tokens: tokens for the R² of the blocks, whose sums take 4 · width² numbers a block; 0 to leave it out.
        kind: kinds of text to compare on beside it, (kind, source) each; `tokens` of every kind are `kind_tokens`.
        seen: kinds that the twin has seen, though its record cannot tell.
        tasks: lm-eval tasks by name.
        device: cpu, cuda or another; auto: the accelerator, if there is one.
        device_map: `auto` spreads a model over several devices; `disk` leaves the weights of both on disk, each read
            when it is used, for models larger than memory.
    """

    twin: str
    original: str
    text: str = "python"
    tokens: int = at_least(2, 16384)
    window: int = at_least(2, 512)
    stride: int | None = at_least(1, None)
    skip: int = at_least(0, 0)
    batch: int = at_least(1, 4)
    block_tokens: int = at_least(0, 4096)
    kind: tuple[tuple[str, str], ...] = ()
    kind_tokens: int = at_least(2, 4096)
    seen: tuple[str, ...] = ()
    unseen_by: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    task_settings: harness.TaskSettings = field(default_factory=harness.TaskSettings)
    speed: bool = True
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | None = None
    revision: str | None = None
    original_revision: str | None = None
    seed: int = 0


CHAT, LINES = "chat:", "lines:"
"""How a kind's text is cut: as turns of a dialogue, or every line by itself."""


def plan_evaluation(twin: str | Path, *, output: str | Path | None = None, **given: Any) -> EvalSettings:
    """What an evaluation would do; everything that can be wrong without running a model is said: `--dry-run`.

    Args:
        given: see :func:`evaluation_settings`.
    Raises:
        SurgeryError: an unknown setting, text or task, a model that is not there, an output that cannot be written.
    """
    planned = evaluation_settings(twin, **given)
    check_evaluation(planned, output)
    return planned


def evaluation_settings(
    twin: str | Path,
    *,
    original: str | Path | None = None,
    skip: int | None = None,
    tasks: str | Sequence[str] = (),
    include_path: str | Sequence[str] = (),
    num_fewshot: int | None = None,
    apply_chat_template: bool | str = False,
    system_instruction: str | None = None,
    limit: float | None = None,
    task_batch: int = 8,
    task_window: int = 2048,
    kind: Mapping[str, str] | Iterable[str] = (),
    seen: str | Iterable[str] = (),
    unseen_by: str | Iterable[str] = (),
    **settings: Any,
) -> EvalSettings:
    """The settings from names and values, checked as far as no model has to be there.

    Args:
        skip: tokens of the text to pass over; by default those that the fit or a refinement saw.
        tasks: lm-eval tasks; in one string, separated by commas.
        include_path: one folder with task files, or several.
        num_fewshot, apply_chat_template, system_instruction, limit, task_batch, task_window: lm-eval's, see
            :class:`evals.harness.TaskSettings`.
        kind: sources by kind, also as KIND=SOURCE each; see :mod:`evals.kinds`.
        seen: kinds that were seen, though the twin's record cannot tell from the names of the texts.
        unseen_by: folders of further twins; what their fits have read is passed over, too, so that all of them can be
            measured on the same tokens.
        settings: the other fields of :class:`EvalSettings`.
    Raises:
        SurgeryError: an unknown setting, or a text that is not there.
    """
    if "task_settings" in settings:
        raise RecipeError("no setting 'task_settings'", fix="say include_path, num_fewshot, limit, …")
    check_source(settings.get("text", EvalSettings.text))
    if original is None:
        original, revision = recorded_original(twin)
        settings.setdefault("original_revision", revision)
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    folders = (include_path,) if isinstance(include_path, str) else tuple(include_path)
    run = checked_settings(
        harness.TaskSettings,
        {
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
            "system_instruction": system_instruction,
            "limit": limit,
            "batch_size": task_batch,
            "max_length": task_window,
            "seed": settings.get("seed", 0),
            "include_path": folders,
        },
    )
    planned = checked_settings(
        EvalSettings,
        {
            **settings,
            "twin": str(twin),
            "original": str(original),
            "kind": parse_kinds(kind),
            "seen": (seen,) if isinstance(seen, str) else tuple(seen),
            "unseen_by": (unseen_by,) if isinstance(unseen_by, str) else tuple(unseen_by),
            "tasks": tuple(name.strip() for name in names if name.strip()),
            "task_settings": run,
        }
        | ({} if skip is None else {"skip": skip}),
    )
    if skip is None:
        first, most = unseen((planned.twin, *planned.unseen_by), planned.text)
        planned = replace(planned, skip=first, tokens=planned.tokens if most is None else min(planned.tokens, most))
    return planned


def check_evaluation(settings: EvalSettings, output: str | Path | None) -> None:
    """Raises SurgeryError for what can be wrong before a model is loaded."""
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
    if output is not None and Path(output).is_file():
        raise EvaluationError("there is a file of this name", where=str(output), fix="name a folder")
    if output is not None and (Path(output) / "config.json").exists():
        raise EvaluationError("the folder holds a model", where=str(output), fix="name another folder for the report")


def parse_kinds(given: Mapping[str, str] | Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(kind, source) each, from a mapping or from KIND=SOURCE. Raises RecipeError for what is neither."""
    if isinstance(given, Mapping):
        given = [f"{kind}={source}" for kind, source in given.items()]
    found: dict[str, str] = {}
    for text in [given] if isinstance(given, str) else given:
        kind, equals, source = str(text).partition("=")
        if not (kind and equals and source):
            raise RecipeError(f"{text!r} is not KIND=SOURCE", where="--kind", fix="as in --kind novel=alice.txt")
        if kind in found:
            raise RecipeError(f"the kind {kind!r} is given twice", where="--kind")
        check_source(source.removeprefix(CHAT).removeprefix(LINES))
        found[kind] = source
    return tuple(found.items())


def unseen(twins: Iterable[str], text: str) -> tuple[int, int | None]:
    """(first token of this text that no fit or refinement of these twins saw, how many; None: all that follow)."""
    ranges = [_unseen(twin, text) for twin in twins]
    begin = max(first for first, _ in ranges)
    ends = [first + most for first, most in ranges if most is not None]
    return begin, max(0, min(ends) - begin) if ends else None


def _unseen(twin: str, text: str) -> tuple[int, int | None]:
    try:
        made = read_report(twin)
    except (OSError, KeyError, ValueError):
        return 0, None
    refined = (made.get("refinement") or {}).get("held_out", {})
    kept = refined.get(label(text))
    if kept:
        return kept["begin"], kept["end"] - kept["begin"]
    return seen_of(made["calibration"], text), None
