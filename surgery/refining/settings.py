"""What `surgery refine` can be told, and what of it can be wrong before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.calibration.mixtures import Mixture
from surgery.calibration.texts import AUTO
from surgery.errors import ModelError, RecipeError, did_you_mean
from surgery.models import loading
from surgery.models.refusals import EXPORTS
from surgery.models.saved_blocks import saved_blocks
from surgery.refining.parameters import SETS
from surgery.runtime.precision import MATMUL
from surgery.saving.report import read_verified_report

OBJECTIVES = ("kl", "local")
LORA = "lora"
SHORTEST = 8  # tokens of a window
COUNTS = ("tokens", "window", "batch", "accumulate", "validate_tokens", "validate_every", "lora_rank")
ABOVE_ZERO = (*COUNTS, "rate", "clip", "temperature")


@dataclass(frozen=True)
class RefineSettings:
    """What `surgery refine` does; the options of the same names.

    Attributes:
        text: training texts, each with its share of the tokens (SOURCE=2), 1 where it says none; auto: broad, or
            python=2, code=2 and samples where that cannot be fetched.
        tokens, window: tokens to train on, in windows of this many; a shorter text is gone through again.
        short: share of the tokens in sentences by themselves, each after a start token.
        batch, accumulate: windows a forward pass and process, and forward passes a step.
        train: coefficients, readout, block, all or lora.
        lora_rank, lora_modules: rank of LoRA, and the modules it goes on (as peft takes them).
        objective: kl (end to end) or local (every block by itself).
        match: weight of the blocks' errors beside KL.
        blend: share of the steps in which the blocks still write part of what the original's would.
        rate, warmup, clip: peak learning rate, the share of the steps to reach it, the bound on the gradient's norm.
        average: decay of the running mean of the weights, which is what is measured and saved; 0: the last weights.
        anchor: norm penalty, the pull towards the weights the run started from, λ/2 ‖θ − θ₀‖², decoupled from the
            gradient as in AdamW (Loshchilov & Hutter, arXiv 1711.05101): θ ← θ − rate·λ·(θ − θ₀).
        temperature: T of the loss.
        dtype: of the forward passes in training; weights and measurements stay in float32. auto: bfloat16 where the
            device multiplies it faster.
        device: cpu, cuda or another; auto: the accelerator, if there is one.
        checkpointing: compute activations again in the backward pass instead of keeping them.
        shard: every process holds a part of every tensor (FSDP2), for models larger than one device.
        validate_tokens, validate_every: held-out tokens, and steps between two looks at them.
        patience: looks without improvement after which to stop; 0 never stops early.
        teacher_top_k: how many of the original's most likely words are kept on disk for windows that come again,
            instead of asking it anew; 0: none, which is exact.
        control: train the original alike, on the text itself, and report it beside the twin.
        report_to: trackers, by accelerate's names.
    """

    twin: str
    original: str
    output: str
    text: tuple[str, ...] = (AUTO,)
    tokens: int = 1_000_000
    window: int = 256
    short: float = 0.1
    batch: int = 4
    accumulate: int = 1
    train: str = "block"
    lora_rank: int = 16
    lora_modules: str = "all-linear"
    objective: str = "kl"
    match: float = 0.0
    blend: float = 0.0
    rate: float = 1e-4
    warmup: float = 0.05
    clip: float = 1.0
    average: float = 0.98
    anchor: float = 0.0
    temperature: float = 1.0
    dtype: str = "auto"
    device: str = "auto"
    checkpointing: bool = False
    shard: bool = False
    validate_tokens: int = 8192
    validate_every: int = 100
    patience: int = 0
    teacher_top_k: int = 0
    seed: int = 0
    control: bool = False
    report_to: tuple[str, ...] = ()
    original_revision: str | None = None


def check_refinement(settings: RefineSettings) -> None:
    """Raises SurgeryError for what can be wrong before a model is loaded."""
    report = read_verified_report(Path(settings.twin))
    if report["form"] in ("silu", *EXPORTS):
        raise RecipeError(f"the {report['form']} form cannot be refined", where=settings.twin, fix="refine its twin")
    loading.placed(settings.device)
    loading.load_config(settings.original, settings.original_revision)
    twin: Any = loading.load_meta(settings.twin)[0]
    if not loading.is_causal(twin):
        raise ModelError("only causal language models can be refined", where=type(twin).__name__)
    most = getattr(twin.config.get_text_config(), "max_position_embeddings", None) or settings.window
    if not SHORTEST <= settings.window <= most:
        raise RecipeError(
            f"{settings.window} is not from {SHORTEST} to {most}, the model's positions", where="--window"
        )
    if any(saved.routed for saved in saved_blocks(twin)) and (settings.objective == "local" or settings.blend):
        raise RecipeError("experts cannot be refined block by block, or blended", fix="leave --objective and --blend")
    check_settings(settings)


def check_settings(settings: RefineSettings) -> None:
    """Raises SurgeryError for what can be wrong before there is a twin."""
    _check_texts(settings)
    _check_values(settings)
    _check_trackers(settings)


def _check_texts(settings: RefineSettings) -> None:
    mixture = Mixture.of(settings.text)
    mixture.check()
    if mixture.is_inputs or (AUTO in settings.text and not mixture.one):
        raise RecipeError(
            f"{mixture.name} is not a text", where="--text", fix="broad, samples, hub:NAME or a text file"
        )


def _check_values(settings: RefineSettings) -> None:
    for name in ABOVE_ZERO:
        if not getattr(settings, name) > 0:
            raise RecipeError(f"{getattr(settings, name)} is not positive", where=f"--{name.replace('_', '-')}")
    for name in ("average", "blend", "warmup", "short"):
        if not 0 <= getattr(settings, name) < 1:
            raise RecipeError(f"{getattr(settings, name)} is not from 0 up to, not including, 1", where=f"--{name}")
    for name in ("anchor", "match", "patience", "teacher_top_k"):
        if getattr(settings, name) < 0:
            raise RecipeError(f"{getattr(settings, name)} is below 0", where=f"--{name.replace('_', '-')}")
    for name, known in {"train": (*SETS, LORA), "objective": OBJECTIVES, "dtype": MATMUL}.items():
        value = getattr(settings, name)
        if value not in known:
            raise RecipeError(f"no {name} {value!r}{did_you_mean(value, known)}", fix=f"one of {', '.join(known)}")
    if settings.teacher_top_k and (settings.objective != "kl" or settings.match):
        raise RecipeError(
            "predictions are kept, not what the original's blocks write",
            where="--teacher-top-k",
            fix="leave it, or --match and --objective",
        )
    if settings.objective == "local" and settings.train in (LORA, "all"):
        raise RecipeError("local refinement trains what is in blocks", fix="--train block, or --objective kl")


def _check_trackers(settings: RefineSettings) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for tracker in settings.report_to:
        if tracker not in available:
            names = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            fix = f"pip install {tracker}" if tracker in LOGGER_TYPE_TO_CLASS else f"one of {names}"
            raise RecipeError(f"the tracker {tracker!r} is not installed", where="--report-to", fix=fix)
