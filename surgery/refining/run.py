"""A brief distillation of a twin from its original: what the closed form leaves, made smaller.

    L = mean over tokens of T² KL(softmax(original ÷ T) ‖ softmax(twin ÷ T))

Teacher and twin share every tensor that is not trained, so memory holds one model, the original's feed-forward blocks,
the running mean of what is trained and the optimiser's state. Training windows are drawn in one seeded order and shared
out between the processes, so that a step sees the same text whatever their number, as long as batch × accumulate ×
processes is the same.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from surgery.errors import RecipeError, SurgeryError, checked_settings
from surgery.models import loading
from surgery.refining import sharding
from surgery.refining.objectives import EndToEnd, Local, NextToken, Objective
from surgery.refining.packing import PackedWindows
from surgery.refining.parameters import named_trainable, twin_block_paths
from surgery.refining.record import record_of, run_key
from surgery.refining.settings import LORA, RefineSettings, autocast, check_refinement, schedule_of
from surgery.refining.student import checkpoint_activations, load_teacher, prepared, whole_student, with_lora
from surgery.refining.text import training_windows
from surgery.refining.training import Schedule, Training
from surgery.saving.checkpoint import save
from surgery.saving.folder import check_target
from surgery.saving.reload import probe_inputs
from surgery.saving.report import read_verified_report


def refine(
    twin: str | Path,
    teacher: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Distils a twin briefly from its original, keeps the state of least held-out divergence, saves and verifies.

    Under `accelerate launch` every process must call it. An interrupted run goes on exactly where it stopped.

    Args:
        twin: folder of a finished twin; `teacher`: the original: Hub id, folder or .gguf.
        output: folder for the refined twin.
        overwrite, restart: replace an earlier twin there; discard the state of an interrupted run.
        settings: the other fields of :class:`~surgery.refining.settings.RefineSettings`.
    Returns:
        the refinement's record, as the report holds it: losses in nats per held-out token, before and after.
    Raises:
        SurgeryError: teacher and twin do not match, too little text, values not finite, a folder of another run, or
            too little memory.
    """
    chosen = refine_settings(twin, teacher, output, **settings)
    check_refinement(chosen)
    return refined(chosen, overwrite, restart, quiet)


def refine_settings(twin: str | Path, teacher: str | Path, output: str | Path, **settings: Any) -> RefineSettings:
    """Settings by name. Raises RecipeError for unknown ones."""
    for name in ("text", "report_to"):
        given = settings.get(name, ())
        settings |= {name: (given,) if isinstance(given, str) else tuple(given)} if name in settings else {}
    given = {**settings, "twin": str(twin), "teacher": str(teacher), "output": str(output)}
    return checked_settings(RefineSettings, given)


def refined(
    settings: RefineSettings, overwrite: bool = False, restart: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """What :func:`refine` does, for settings that were checked.

    Raises:
        SurgeryError: teacher and twin do not match, too little text, values not finite, a folder of another run, or
            too little memory.
    """
    out = Path(settings.output)
    report = read_verified_report(Path(settings.twin))
    out = check_target(out, overwrite)
    with _out_of_memory():
        return _refine(settings, out, report, restart, quiet)


def _refine(settings: RefineSettings, out: Path, report: dict[str, Any], restart: bool, quiet: bool) -> dict[str, Any]:
    from accelerate import Accelerator, InitProcessGroupKwargs

    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the others wait while one draws samples
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.accumulate, mixed_precision="no", kwargs_handlers=[patient],
        log_with=list(settings.report_to) or None, project_dir=str(out.parent),
    )  # fmt: skip
    sharded = sharding.wanted(accelerator, settings.shard)
    if sharded and (settings.objective == "local" or settings.blend):
        raise RecipeError("sharded blocks cannot be run by themselves", fix="leave --objective and --blend, or --shard")
    loaded = loading.load(settings.twin)
    student: Any = loaded.model
    teacher = load_teacher(settings, student)
    if not sharded or "samples" in settings.text:
        teacher.to(accelerator.device)
    twin, replaced = student, twin_block_paths(student)
    if settings.train == LORA:
        student, trainable = with_lora(student, settings)
    else:
        trainable = named_trainable(student, settings.train)
    place = out.with_name(out.name + ".refining")
    if restart and accelerator.is_main_process:
        shutil.rmtree(place, ignore_errors=True)
    accelerator.wait_for_everyone()
    held, windows, ranges = training_windows(settings, loaded.tokenizer, report, teacher, accelerator, place)
    if settings.checkpointing:
        checkpoint_activations(student)
    network, optimizer, trainable, saved = prepared(settings, accelerator, student, twin, teacher, trainable, replaced)
    objective = _objective(settings, accelerator, network, teacher, twin, [paths for paths, _ in replaced])
    if settings.report_to:
        accelerator.init_trackers("polysurgery", config={k: str(v) for k, v in asdict(settings).items()})
    log = (lambda values, step: accelerator.log(values, step=step)) if settings.report_to else None
    schedule = schedule_of(settings, accelerator.num_processes)
    key = run_key(settings, report, windows, accelerator.num_processes)
    run = Training(
        accelerator, network, teacher, objective, trainable, optimizer, schedule, held, windows, key, log
    )  # fmt: skip
    _run(run, place, quiet)
    after = run.restore_best(torch.float32 if settings.train == LORA else getattr(torch, loaded.source.dtype))
    record = record_of(settings, run, ranges, after) | {"shared_bytes": saved, "sharded": sharded, "control": None}
    if settings.control:
        optimizer.state.clear()
        record["control"] = _control(settings, accelerator, replaced, held, windows, schedule, key, place, quiet)
    state = sharding.whole_state(student) if sharded else None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        student = student if state is None else whole_student(settings, state)
        _save(settings, student, loaded, report, record, windows.ids[:2], out)
        shutil.rmtree(place, ignore_errors=True)
    accelerator.end_training()
    return record


def _save(
    settings: RefineSettings, student: Any, loaded: loading.LoadedModel, report: dict[str, Any],
    record: dict[str, Any], ids: torch.Tensor, out: Path,
) -> None:  # fmt: skip
    if settings.train == LORA:
        student = student.merge_and_unload()
    if "refinement" in report:
        report.setdefault("earlier_refinements", []).append(report["refinement"])
    form = "native" if report["form"] == "native" else "custom"  # a delta is whole now
    report |= {"refinement": record, "form": form}
    report.pop("exported_from", None)
    probe = probe_inputs({"input_ids": ids.to(student.device)})
    save(student, loaded.tokenizer, out, report, probe, dtype=loaded.source.dtype, form=form)
    _draw(record, out)


def _objective(
    settings: RefineSettings, accelerator: Any, network: Any, teacher: Any, twin: Any, blocks: list[tuple[str, ...]]
) -> Objective:
    precision = autocast(settings.precision, accelerator.device)
    if settings.objective == "local":
        return Local(accelerator, teacher, precision, twin, blocks)
    return EndToEnd(
        accelerator, network, teacher, precision, twin, blocks, settings.temperature, settings.match, settings.blend
    )


def _run(run: Training, place: Path, quiet: bool, label: str = "refining") -> None:
    run.resume(place)
    before, begun = run.seconds, time.monotonic()
    for _ in run.steps(quiet, label):
        run.seconds = before + time.monotonic() - begun
        run.keep(place)


def _control(
    settings: RefineSettings, accelerator: Any, replaced: list[tuple[tuple[str, ...], str]],
    held: dict[str, PackedWindows], windows: PackedWindows, schedule: Schedule, key: dict[str, Any], place: Path,
    quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """The original trained alike on the text itself: same parameters, windows, steps and rates.

    By its own divergence it has nothing to learn, so this is what the text alone would teach an original.
    """
    original: Any = loading.load(settings.teacher, settings.teacher_revision).model
    still = copy.deepcopy(original).requires_grad_(False)
    which = "block" if settings.train in (LORA, "coefficients") else settings.train
    trainable = named_trainable(original, which, replaced)
    if settings.checkpointing:
        checkpoint_activations(original)
    if not sharding.wanted(accelerator, settings.shard):
        still.to(accelerator.device)
    network, optimizer, trainable, _ = prepared(settings, accelerator, original, original, still, trainable, replaced)
    objective = NextToken(accelerator, network, autocast(settings.precision, accelerator.device))
    run = Training(
        accelerator, network, still, objective, trainable, optimizer, schedule, held, windows, key | {"control": True}
    )
    _run(run, place / "control", quiet, "control")
    nats = [row["nats"] for row in run.curve]
    return {"nats_before": nats[0], "nats_after": nats[-1], "least": min(nats), "curve": run.curve}


def _draw(record: dict[str, Any], out: Path) -> None:
    """refinement.png beside the weights, where matplotlib is there."""
    from surgery.refining.plot import plot_refinement

    plot_refinement(record, out / "refinement.png")


@contextmanager
def _out_of_memory() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_little_memory() from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise _too_little_memory() from error


def _too_little_memory() -> SurgeryError:
    return SurgeryError(
        "out of memory",
        cause="activations grow with batch × length, logits with the vocabulary too; what is trained counts five times",
        fix="lower --batch (and raise --accumulate by as much) or --length; then --checkpointing, --train readout or "
        "lora, --objective local, or --shard with several processes (and --restart, where steps were done already)",
    )


def plan_refinement(
    twin: str | Path, teacher: str | Path, output: str | Path, *, processes: int = 1, **given: Any
) -> dict[str, Any]:
    """What :func:`refine` would do, without loading weights: `--dry-run`."""
    settings = refine_settings(twin, teacher, output, **given)
    check_refinement(settings)
    return _planned(settings, processes)


def _planned(settings: RefineSettings, processes: int) -> dict[str, Any]:
    twin, _ = loading.load_meta(settings.twin)
    inside = set(named_trainable(twin, "block"))
    trainable = with_lora(twin, settings)[1] if settings.train == LORA else named_trainable(twin, settings.train)
    count = sum(value.numel() for value in trainable.values())
    schedule = schedule_of(settings, processes)
    a_step = settings.batch * settings.accumulate * processes * settings.length
    parameters = sum(value.numel() for value in twin.parameters())
    originals = sum(value.numel() for name, value in twin.named_parameters() if name in inside)
    # weights once, the original's blocks (or, sharded, both models), and of what is trained gradient, mean, best and
    # two moments
    numbers = (2 * parameters + 5 * count) // processes if settings.shard else parameters + originals + 5 * count
    return {
        "settings": asdict(settings),
        "steps": schedule.steps,
        "tokens_a_step": a_step,
        "trained_parameters": count,
        "parameters": parameters,
        "bytes_at_least": 4 * numbers,
    }
