"""A brief distillation of a twin from its original: what the closed form leaves, made smaller.

    L = mean over tokens of T² KL(softmax(original ÷ T) ‖ softmax(twin ÷ T))

Teacher and twin share every tensor that is not trained, so memory holds one model, the original's feed-forward blocks,
the running mean of what is trained and the optimiser's state. Training windows are drawn in one seeded order and shared
out between the processes, so that a step sees the same text whatever their number, as long as batch × accumulate ×
processes is the same.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.mixtures import Mixture
from surgery.calibration.texts import SAMPLES
from surgery.errors import RecipeError, SurgeryError
from surgery.models import loading
from surgery.refining import sharding
from surgery.refining.kept_predictions import KeptPredictions, bytes_kept
from surgery.refining.objectives import EndToEnd, Local, NextToken, Objective
from surgery.refining.parameters import named_trainable, twin_block_paths
from surgery.refining.plot import plot_refinement
from surgery.refining.record import record_of, run_key
from surgery.refining.schedule import Schedule
from surgery.refining.settings import LORA, SHORTEST, RefineSettings, check_refinement
from surgery.refining.student import (
    Trainee,
    checkpoint_activations,
    load_teacher,
    ready_student,
    whole_student,
    with_lora,
)
from surgery.refining.text import training_sources, training_windows
from surgery.refining.training import Training
from surgery.runtime import processes
from surgery.runtime.freed_memory import keep_freed_memory
from surgery.runtime.precision import autocast, chosen_dtype, usable_dtype
from surgery.runtime.public import printable
from surgery.runtime.settings import checked_settings
from surgery.runtime.vocabulary import understands_former_names
from surgery.saving.checkpoint import save
from surgery.saving.folder import check_room, check_target, kept_beside
from surgery.saving.reload import probe_inputs
from surgery.saving.report import read_verified_report, recorded_original


@understands_former_names
def refine(
    twin: str | Path,
    original: str | Path | None = None,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Distils a twin briefly from its original, keeps the state of least held-out divergence, saves and verifies.

    Under `accelerate launch` every process must call it. An interrupted run goes on exactly where it stopped.

    Args:
        twin: folder of a finished twin.
        original: the teacher: Hub id, folder or .gguf; by default what the twin was made from.
        output: folder for the refined twin.
        overwrite, restart: replace an earlier twin there; discard the state of an interrupted run.
        settings: the other fields of :class:`~surgery.refining.settings.RefineSettings`.
    Returns:
        the refinement's record, as the report holds it: losses in nats per held-out token, before and after.
    Raises:
        SurgeryError: teacher and twin do not match, too little text, values not finite, a folder of another run, or
            too little memory.
    """
    chosen = refine_settings(twin, original, output, **settings)
    check_refinement(chosen)
    return refined(chosen, overwrite, restart, quiet)


def refine_settings(
    twin: str | Path, original: str | Path | None, output: str | Path | None, **settings: Any
) -> RefineSettings:
    """Settings by name. Raises RecipeError for unknown ones, and where the original has to be named."""
    given = {**settings, "twin": str(twin), "original": str(original)}
    if original is None:
        given["original"], revision = recorded_original(twin)
        given.setdefault("original_revision", revision)
    if output is not None:
        given["output"] = str(output)
    for name in {"text", "report_to"} & settings.keys():
        given[name] = (given[name],) if isinstance(given[name], str) else tuple(given[name])
    return checked_settings(RefineSettings, given)


def refined(
    settings: RefineSettings, overwrite: bool = False, restart: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """What :func:`refine` does, for settings that were checked.

    Raises:
        SurgeryError: teacher and twin do not match, too little text, values not finite, a folder of another run, or
            too little memory.
    """
    report = read_verified_report(Path(settings.twin))
    out = check_target(Path(settings.output), overwrite)
    with _out_of_memory():
        run = _Refinement(settings, report, out, restart, quiet)
        record, trained = run.train()
        if settings.control:
            record["control"] = run.control(trained)
        run.save(record)
    return record


class _Refinement:
    """Teacher and student, and the text that the student is trained on.

    Attributes:
        student, twin: what is trained, LoRA's wrapper included, and the twin inside it.
        replaced, trainable: the twin's blocks, and its parameters to train, by name.
        held, windows, ranges: see :func:`surgery.refining.text.training_windows`.
        place: where the state is kept.
    """

    def __init__(self, settings: RefineSettings, report: dict[str, Any], out: Path, restart: bool, quiet: bool) -> None:
        self.settings, self.report, self.out, self.quiet = settings, report, out, quiet
        self.accelerator = accelerator = _accelerator(settings, out)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.sharded = sharding.wanted(accelerator, settings.shard)
        if self.sharded and (settings.objective == "local" or settings.blend):
            raise RecipeError(
                "sharded blocks cannot be run by themselves", fix="leave --objective and --blend, or --shard"
            )
        _check_processes(settings, accelerator.num_processes)
        self.loaded = loading.loaded(settings.twin)
        self.twin: Any = self.loaded.model
        check_room(out, self.twin, self.loaded.source.dtype)
        self.teacher = load_teacher(settings, self.twin)
        text, self.note = processes.looked_up(lambda: training_sources(settings, self.loaded.text_tokenizer))
        self.settings = settings = replace(settings, text=text)
        if self.note:
            self._say(f"text: {', '.join(text)}; {self.note}")
        if not self.sharded or (Mixture.of(text).share(SAMPLES) and accelerator.is_main_process):
            self.teacher.to(accelerator.device)
        self.replaced = twin_block_paths(self.twin)
        if settings.train == LORA:
            self.student, self.trainable = with_lora(self.twin, settings)
        else:
            self.student, self.trainable = self.twin, named_trainable(self.twin, settings.train)
        self.place = kept_beside(out, "refining")
        if restart and accelerator.is_main_process:
            shutil.rmtree(self.place, ignore_errors=True)
        accelerator.wait_for_everyone()
        self.held, self.windows, self.ranges = training_windows(
            settings, self.loaded.tokenizer, report, self.teacher, out.parent, quiet
        )
        if settings.short and self.windows.texts.positions is None:
            left_out = "no sentences by themselves (--short): this model does not keep packed documents apart"
            self.note = "; ".join(filter(None, (self.note, left_out)))
            self._say(left_out)
        self.schedule = Schedule.of(settings, accelerator.num_processes)
        self.key = run_key(settings, report, self.held, self.windows, accelerator.num_processes)
        self.autocast = partial(autocast, processes.looked_up(self._matmul), accelerator.device, cached=True)

    def _matmul(self) -> str:
        """What training multiplies matrices in."""
        device, few = self.accelerator.device, self._few(1)[:, :SHORTEST].to(self.accelerator.device)
        if self.sharded:  # the teacher is not where it will run
            return chosen_dtype(self.settings.dtype, device)
        return usable_dtype(self.settings.dtype, device, lambda: self.teacher(input_ids=few, use_cache=False))

    def _few(self, rows: int) -> Tensor:
        """Ids of windows to try the model with."""
        return next(iter(self.held.values())).ids[:rows].long()

    def _say(self, what: str) -> None:
        if not self.quiet and self.accelerator.is_main_process:
            print(printable(what), file=sys.stderr)

    def train(self) -> tuple[dict[str, Any], Trainee]:
        """Trains the student to the end and puts its best state in place; the record, and what was trained."""
        settings, accelerator = self.settings, self.accelerator
        if settings.checkpointing:
            checkpoint_activations(self.student)
        pair = self.student, self.twin, self.teacher
        trainee = ready_student(settings, accelerator, pair, set(self.trainable), self.replaced)
        log = None
        if settings.report_to:
            accelerator.init_trackers("polysurgery", config={k: str(v) for k, v in asdict(settings).items()})
            log = lambda values, step: accelerator.log(values, step=step)  # noqa: E731
        run = self._run(trainee, self.teacher, self._objective(trainee.network), log=log)
        stored = getattr(torch, self.loaded.source.dtype)
        after = run.restore_best(torch.float32 if settings.train == LORA else stored)
        more = {"shared_bytes": trainee.shared_bytes, "sharded": self.sharded, "control": None}
        return record_of(settings, run, self.ranges, after) | more | {"note": self.note}, trainee

    def _objective(self, network: Any) -> Objective:
        settings, blocks = self.settings, [paths for paths, _ in self.replaced]
        if settings.objective == "local":
            return Local(self.accelerator, self.teacher, self.autocast, self.twin, blocks)
        weights = settings.temperature, settings.match, settings.blend, self._kept()
        return EndToEnd(self.accelerator, network, self.teacher, self.autocast, self.twin, blocks, *weights)

    def _kept(self) -> KeptPredictions | None:
        """Where the original's predictions are kept for windows that come again, if they are to be."""
        settings = self.settings
        if not settings.teacher_top_k:
            return None
        texts, own = self.windows.texts, len(self.windows) - len(self.windows.texts)
        kept = None
        if len(texts):
            count = min(settings.teacher_top_k, self.teacher.config.get_text_config().vocab_size)
            name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
            kept = KeptPredictions(self.place, name, texts, count, settings.temperature)
        if kept is None or settings.tokens <= (kept.distinct + own) * settings.window:
            self._say("no window comes again before the end: keeping the original's predictions wins nothing")
        return kept

    def _run(
        self, student: Trainee, teacher: Any, objective: Objective, control: bool = False, log: Any = None
    ) -> Training:
        """From where an earlier run stopped to the end; the state is kept after every look at held-out text."""
        key = self.key | ({"control": True} if control else {})
        text = self.held, self.windows.again()
        run = Training(self.accelerator, student, teacher, objective, self.schedule, *text, key, log)
        place = self.place / "control" if control else self.place
        run.resume(place)
        before, begun = run.seconds, time.monotonic()
        for _ in run.steps(self.quiet, "control" if control else "refining"):
            run.seconds = before + time.monotonic() - begun
            run.keep(place)
        return run

    def control(self, trained: Trainee) -> dict[str, Any]:
        """The original trained alike on the text itself: same parameters, windows, steps and rates.

        By its own divergence it has nothing to learn, so this is what the text alone would teach an original.
        `trained` gives up its optimiser's state.
        """
        settings, accelerator = self.settings, self.accelerator
        trained.optimizer.state.clear()
        original: Any = loading.loaded(settings.original, settings.original_revision).model
        still = copy.deepcopy(original).requires_grad_(False)
        which = "block" if settings.train in (LORA, "coefficients") else settings.train
        trainable = named_trainable(original, which, self.replaced)
        if settings.checkpointing:
            checkpoint_activations(original)
        if not self.sharded:
            still.to(accelerator.device)
        pair = original, original, still
        trainee = ready_student(settings, accelerator, pair, set(trainable), self.replaced)
        run = self._run(trainee, still, NextToken(accelerator, trainee.network, self.autocast), control=True)
        nats = [row["nats"] for row in run.curve]
        return {"nats_before": nats[0], "nats_after": nats[-1], "least": min(nats), "curve": run.curve}

    def save(self, record: dict[str, Any]) -> None:
        """Writes the refined twin, verified, on the first process, while the others wait."""
        state = sharding.whole_state(self.student) if self.sharded else None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            student = self.student if state is None else whole_student(self.settings, state)
            if self.settings.train == LORA:
                student = student.merge_and_unload()
            report, dtype = self.report, self.loaded.source.dtype
            if "refinement" in report:
                report.setdefault("earlier_refinements", []).append(report["refinement"])
            form = "native" if report["form"] == "native" else "custom"  # a delta is whole now
            report |= {"refinement": record, "form": form}
            report.pop("exported_from", None)
            probe = probe_inputs({"input_ids": self._few(2).to(student.device)})
            how: dict[str, Any] = {"dtype": dtype, "form": form, "companions": self.loaded.companions}
            save(student, self.loaded.tokenizer, self.out, report, probe, **how)
            plot_refinement(record, self.out / "refinement.png")
            shutil.rmtree(self.place, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # nobody leaves before the twin stands
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _check_processes(settings: RefineSettings, processes: int) -> None:
    if settings.teacher_top_k and processes > 1:
        raise RecipeError(
            "a window that comes again mostly comes to another process, which has not seen it",
            where="--teacher-top-k",
            fix="leave it, or run one process",
        )


def _accelerator(settings: RefineSettings, out: Path) -> Any:
    from accelerate import Accelerator

    processes.join()
    place = loading.placed(settings.device)
    if settings.device != "auto" and place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    return Accelerator(
        cpu=settings.device != "auto" and place.type == "cpu",
        gradient_accumulation_steps=settings.accumulate,
        mixed_precision="no",
        log_with=list(settings.report_to) or None,
        project_dir=str(out.parent),
    )


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
        fix="lower --batch (and raise --accumulate by as much) or --window; then --checkpointing, --train readout or "
        "lora, --objective local, or --shard with several processes (and --restart, where steps were done already)",
    )


def plan_refinement(
    twin: str | Path,
    original: str | Path | None = None,
    output: str | Path | None = None,
    *,
    processes: int = 1,
    **given: Any,
) -> dict[str, Any]:
    """What :func:`refine` would do, without loading weights: `--dry-run`."""
    settings = refine_settings(twin, original, output, **given)
    check_refinement(settings)
    _check_processes(settings, processes)
    return _planned(settings, processes)


def _planned(settings: RefineSettings, processes: int) -> dict[str, Any]:
    twin, *_ = loading.load_meta(settings.twin)
    inside = set(named_trainable(twin, "block"))
    trainable = with_lora(twin, settings)[1] if settings.train == LORA else named_trainable(twin, settings.train)
    count = sum(value.numel() for value in trainable.values())
    schedule = Schedule.of(settings, processes)
    a_step = settings.batch * settings.accumulate * processes * settings.window
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
        "predictions_bytes": bytes_kept(settings.tokens, settings.teacher_top_k),
    }
