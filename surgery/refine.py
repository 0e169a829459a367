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
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery import checkpoint, loading, sharding
from surgery.card import read_twin
from surgery.distill import named_trainable, names_inside, replaced_modules, share
from surgery.errors import RecipeError, SurgeryError
from surgery.objectives import EndToEnd, Local, NextToken, Objective
from surgery.packing import Windows
from surgery.refine_settings import LORA, RefineSettings, schedule_of
from surgery.refine_text import training_windows
from surgery.texts import label
from surgery.training import Schedule, Training


def refine(
    settings: RefineSettings, overwrite: bool = False, restart: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """Distils, keeps the state of least held-out divergence, saves and verifies; the refinement's record.

    Raises:
        SurgeryError: teacher and twin do not match, too little text, values not finite, a folder of another run, or
            too little memory.
    """
    out = Path(settings.output)
    report = read_twin(Path(settings.twin))
    out = checkpoint.check_target(out, overwrite)
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
    teacher = _teacher(settings, student)
    if not sharded or "samples" in settings.text:
        teacher.to(accelerator.device)
    twin, replaced = student, replaced_modules(student)
    if settings.train == LORA:
        student, trainable = _with_lora(student, settings)
    else:
        trainable = named_trainable(student, settings.train)
    place = out.with_name(out.name + ".refining")
    if restart and accelerator.is_main_process:
        shutil.rmtree(place, ignore_errors=True)
    accelerator.wait_for_everyone()
    held, windows, ranges = training_windows(settings, loaded.tokenizer, report, teacher, accelerator, place)
    if settings.checkpointing:
        checkpoint_activations(student)
    network, optimizer, trainable, saved = _prepared(settings, accelerator, student, twin, teacher, trainable, replaced)
    objective = _objective(settings, accelerator, network, teacher, twin, [paths for paths, _ in replaced])
    if settings.report_to:
        accelerator.init_trackers("polysurgery", config={k: str(v) for k, v in asdict(settings).items()})
    log = (lambda values, step: accelerator.log(values, step=step)) if settings.report_to else None
    schedule = schedule_of(settings, accelerator.num_processes)
    key = _key(settings, report, windows, accelerator.num_processes)
    run = Training(
        accelerator, network, teacher, objective, trainable, optimizer, schedule, held, windows, key, log
    )  # fmt: skip
    _run(run, place, quiet)
    after = run.restore_best(torch.float32 if settings.train == LORA else getattr(torch, loaded.source.dtype))
    record = _record(settings, run, ranges, after) | {"shared_bytes": saved, "sharded": sharded, "control": None}
    if settings.control:
        optimizer.state.clear()
        record["control"] = _control(settings, accelerator, replaced, held, windows, schedule, key, place, quiet)
    state = sharding.whole_state(student) if sharded else None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        student = student if state is None else _whole(settings, state)
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
    native = report["form"] == "native"
    report |= {"refinement": record, "form": "native" if native else "custom"}
    report.pop("exported_from", None)
    probe = checkpoint.probe_inputs({"input_ids": ids.to(student.device)})
    checkpoint.save(student, loaded.tokenizer, out, report, probe, dtype=loaded.source.dtype, native=native)
    _draw(record, out)


def _objective(
    settings: RefineSettings, accelerator: Any, network: Any, teacher: Any, twin: Any, blocks: list[tuple[str, ...]]
) -> Objective:
    precision = _autocast(settings.precision, accelerator.device)
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


def _key(settings: RefineSettings, report: dict[str, Any], windows: Windows, processes: int) -> dict[str, Any]:
    """What an interrupted run must share with this one to be gone on with: settings, the twin's weights, the text."""
    return {
        **asdict(settings), "report_to": None, "checkpointing": None, "processes": processes,
        "weights": report["verification"]["weights"],
        "windows": hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest(),
    }  # fmt: skip


def _teacher(settings: RefineSettings, student: Any) -> Any:
    """The original; as a Llama where the twin was made from it as one."""
    teacher: Any = loading.load(settings.teacher, settings.teacher_revision).model
    if type(student).__name__ == "LlamaForCausalLM" and type(teacher).__name__ != "LlamaForCausalLM":
        from surgery.reexpress import as_llama

        return as_llama(teacher) or teacher
    return teacher


def _with_lora(student: Any, settings: RefineSettings) -> tuple[Any, dict[str, nn.Parameter]]:
    from peft import LoraConfig, get_peft_model

    names = settings.lora_modules
    torch.manual_seed(settings.seed)
    try:
        adapted = get_peft_model(
            student,
            LoraConfig(
                r=settings.lora_rank, lora_alpha=2 * settings.lora_rank,
                target_modules=names if names == "all-linear" else names.split(","),
            ),
        )  # fmt: skip
    except ValueError as error:
        raise RecipeError(str(error).splitlines()[0], where="--lora-modules") from error
    return adapted, {name: value for name, value in adapted.named_parameters() if value.requires_grad}


def _whole(settings: RefineSettings, state: dict[str, Any]) -> Any:
    """The student in one piece, from the tensors of a sharded one."""
    model: Any = loading.load(settings.twin).model
    if settings.train == LORA:
        model, _ = _with_lora(model, settings)
    model.load_state_dict(state)
    return model


def checkpoint_activations(model: Any) -> None:
    """Layers keep their input alone and run again in the backward pass; nothing else changes.

    transformers does so in layers that are training, and there only; their children stay as they are, and dropout that
    a layer applies by itself is set to 0.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True
            for name, value in list(vars(layer).items()):
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)


def _optimizer(settings: RefineSettings, trainable: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW without weight decay: the twin begins close to where it should end."""
    return torch.optim.AdamW(trainable.values(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.0)


def _autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """bf16 where the processor multiplies it faster than float32, weights in float32 all the same."""
    wanted = precision if precision != "auto" else ("bf16" if _fast_bf16(device) else "float32")
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=wanted == "bf16")


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    look = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and look is not None and bool(look())


def _prepared(
    settings: RefineSettings, accelerator: Any, student: Any, twin: Any, teacher: Any,
    trainable: dict[str, nn.Parameter], replaced: list[tuple[tuple[str, ...], str]],
) -> tuple[Any, Any, dict[str, nn.Parameter], int]:  # fmt: skip
    """The student as it is called, its optimiser, what is trained, and the bytes that it shares with the teacher."""
    inside = names_inside(replaced)
    if not sharding.wanted(accelerator, settings.shard):
        network, optimizer = accelerator.prepare(student, _optimizer(settings, trainable))
        # Only now, since moving to a device copies.
        return network, optimizer, trainable, share(student, teacher, set(trainable), inside)
    teacher.to("cpu")
    share(student, teacher, set(trainable), inside)  # one model in memory until each process has its parts
    for network, model in ((student, twin), (teacher, teacher)):
        sharding.shard(network, model, (paths[0] for paths, _ in replaced), accelerator)
    trainable = {name: value for name, value in student.named_parameters() if name in trainable}
    return student, _optimizer(settings, trainable), trainable, 0


def _control(
    settings: RefineSettings, accelerator: Any, replaced: list[tuple[tuple[str, ...], str]],
    held: dict[str, Windows], windows: Windows, schedule: Schedule, key: dict[str, Any], place: Path, quiet: bool,
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
    network, optimizer, trainable, _ = _prepared(settings, accelerator, original, original, still, trainable, replaced)
    objective = NextToken(accelerator, network, _autocast(settings.precision, accelerator.device))
    run = Training(
        accelerator, network, still, objective, trainable, optimizer, schedule, held, windows, key | {"control": True}
    )
    _run(run, place / "control", quiet, "control")
    nats = [row["nats"] for row in run.curve]
    return {"nats_before": nats[0], "nats_after": nats[-1], "least": min(nats), "curve": run.curve}


def _record(
    settings: RefineSettings, run: Training, ranges: dict[str, dict[str, int]], after: dict[str, Any]
) -> dict[str, Any]:
    """What the report says of the refinement; `after` is what the weights lose as they are stored."""
    finite = [row for row in run.curve if math.isfinite(row["divergence"])]
    first, best = run.curve[0], min(finite, key=lambda row: row["divergence"])
    shown = {**asdict(settings), "report_to": list(map(str, settings.report_to))}
    shown |= {name: Path(shown[name]).name for name in ("twin", "output")}
    shown["text"] = [label(source) for source in settings.text]
    return {
        "options": _options(settings),
        "settings": shown | {"teacher": loading.public(settings.teacher, loading.locate(settings.teacher)[2])},
        "processes": run.accelerator.num_processes,
        "trained_parameters": sum(value.numel() for value in run.trainable.values()),
        "tokens_seen": run.tokens_seen,
        "passes_over_the_text": round(run.tokens_seen / run.windows.ids.numel(), 2),
        "held_out": ranges,
        "seconds": round(run.seconds, 1),
        "held_out_tokens": sum(len(part) * (part.ids.shape[1] - 1) for part in run.held.values()),
        "lost_before": first["lost"],
        "lost_after": after["lost"],
        "best_step": best["step"],
        "divergence_before": first["divergence"],
        "divergence_after": after["divergence"],
        "after": after,
        "skipped_steps": run.skipped,
        "curve": run.curve,
        "losses": run.losses,
    }


def _options(settings: RefineSettings) -> str:
    """What was chosen, as options of `surgery refine`."""
    words = [f"--text {label(source)}" for source in settings.text]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == field.default or field.name in ("twin", "teacher", "output", "text", "report_to"):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def _draw(record: dict[str, Any], out: Path) -> None:
    """refinement.png beside the weights, where matplotlib is there."""
    from surgery import curves

    curves.draw(record, out / "refinement.png")


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


def plan(settings: RefineSettings, processes: int = 1) -> dict[str, Any]:
    """What a refinement would do, without loading weights: `--dry-run`."""
    twin, _ = loading.load_meta(settings.twin)
    inside = set(named_trainable(twin, "block"))
    trainable = _with_lora(twin, settings)[1] if settings.train == LORA else named_trainable(twin, settings.train)
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


def is_main_process() -> bool:
    """Whether this process is the one that speaks."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
