"""How polynomial a model's blocks are, through its training: `surgery trace`."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.blocks.block import Block
from surgery.blocks.find import survey
from surgery.blocks.parts import attribute
from surgery.blocks.verify import verify_all
from surgery.calibration.inputs import calibration_inputs
from surgery.closed_form import sinks
from surgery.errors import CheckpointError, ModelError, RecipeError, SurgeryError
from surgery.models import loading
from surgery.reading.approximation import approximations
from surgery.runtime.files import not_written, write_bytes, write_json
from surgery.runtime.hooks import hooked
from surgery.runtime.progress import progress
from surgery.runtime.settings import at_least, checked_settings
from surgery.runtime.vocabulary import understands_former_names

FORMAT = 1
JSON, PLOT = "trace.json", "trace.png"
NAMES = {1: "linear", 2: "quadratic", 3: "cubic"}
COLOURS = ("#d29922", "#1f6feb", "#8250df", "#1a7f37")


@dataclass(frozen=True)
class TraceSettings:
    """What is measured at every checkpoint; the options of the same names.

    Attributes:
        degrees: of the approximants.
        text, tokens, window: what drives the blocks: a text source, how much of it, in windows of how many tokens.
    """

    degrees: tuple[int, ...] = (1, 2)
    text: str = "python"
    tokens: int = at_least(2, 4096)
    window: int = at_least(2, 256)
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class TrainingStep:
    """One moment of training: a folder, or a revision on the Hub."""

    name: str
    revision: str | None

    @property
    def label(self) -> str:
        return self.revision or Path(self.name).name

    @property
    def step(self) -> int | None:
        """The last number in its label, as in step1000 or checkpoint-500."""
        numbers = re.findall(r"\d+", self.label)
        return int(numbers[-1]) if numbers else None

    @property
    def key(self) -> str:
        """Which weights it stands for, without reading them."""
        folder = Path(self.name)
        files = [(file.name, *_stamp(file)) for file in sorted(folder.glob("*.*"))] if folder.is_dir() else []
        text = json.dumps([self.name if not files else self.label, self.revision, files])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stamp(file: Path) -> tuple[int, int]:
    seen = file.stat()
    return seen.st_size, seen.st_mtime_ns


def training_steps(names: Sequence[str], revisions: str | Sequence[str] | None) -> list[TrainingStep]:
    """What to trace. Raises RecipeError unless it is several folders, or one model with several revisions."""
    if revisions is None:
        return [TrainingStep(name, None) for name in names]
    if len(names) != 1:
        raise RecipeError("--revisions goes with one model", fix="surgery trace MODEL --revisions step0,step1000")
    wanted = revisions.split(",") if isinstance(revisions, str) else revisions
    return [TrainingStep(names[0], revision.strip()) for revision in wanted if revision.strip()]


@understands_former_names
def trace(
    checkpoints: str | Path | Sequence[str | Path],
    *,
    revisions: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    restart: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """R² of the closed-form approximants of every block at every checkpoint of a training run.

    Args:
        checkpoints: folders or Hub ids; or one of them, with several `revisions` (in one string: commas between).
        output: folder for trace.json and trace.png; finished checkpoints are kept there and not measured again.
        restart: measure every checkpoint anew.
        settings: fields of :class:`TraceSettings`; degrees may come as one string, "1,2".
    Returns:
        what trace.json holds; checkpoints in it that were not asked for now stand under `others`.
    Raises:
        SurgeryError: nothing to trace, a checkpoint that does not load, a folder that belongs to other settings.
    """
    if "degrees" in settings:
        settings["degrees"] = checked_degrees(settings["degrees"])
    chosen = checked_settings(TraceSettings, settings)
    names = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    steps = training_steps([str(name) for name in names], revisions)
    return traced(steps, chosen, None if output is None else Path(output), restart, quiet)


def checked_degrees(degrees: str | Iterable[int]) -> tuple[int, ...]:
    """Each once, ascending. Raises RecipeError for what is no number from 1 to 9."""
    words = degrees.split(",") if isinstance(degrees, str) else [str(degree) for degree in degrees]
    words = [word.strip() for word in words]
    if not words or not all(word.isdigit() and 1 <= int(word) <= 9 for word in words):
        raise RecipeError(f"no degrees {degrees!r}", fix="numbers from 1 to 9 with commas between, as in 1,2")
    return tuple(sorted({int(word) for word in words}))


def traced(
    steps: Sequence[TrainingStep], settings: TraceSettings, folder: Path | None, restart: bool, quiet: bool
) -> dict[str, Any]:
    """What :func:`trace` gives back, for settings that were checked."""
    if not steps:
        raise RecipeError("no checkpoints were named")
    described = json.loads(json.dumps(asdict(settings)))
    known = {} if folder is None or restart else _known(folder, described)
    report: dict[str, Any] = {"format": FORMAT, "settings": described, "checkpoints": []}
    bar = progress(len(steps), "tracing", quiet)
    for step in steps:
        row = known.pop(step.key, None) or {
            "key": step.key,
            "label": step.label,
            "step": step.step,
            **measure(step, settings),
        }
        report["checkpoints"].append(row)
        if folder is not None:
            _write(folder, {**report, "others": list(known.values())})
        bar.update(1)
    bar.close()
    if folder is not None:
        write_bytes(folder / PLOT, plot(report))
    return report


def _known(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    file = folder / JSON
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("settings") != wanted:
        raise CheckpointError(
            "an earlier trace with other settings is here",
            where=str(folder),
            fix="repeat its command, choose another -o, or give --restart to discard it",
        )
    return {row["key"]: row for row in (*found["checkpoints"], *found["others"])}


def _write(folder: Path, report: dict[str, Any]) -> None:
    try:
        write_json(folder / JSON, report)
    except OSError as error:
        raise not_written(error, "the trace cannot be written", folder) from error


def measure(step: TrainingStep, settings: TraceSettings) -> dict[str, Any]:
    """One checkpoint: a row per block, in one forward pass over the text; no hidden states are kept.

    Mixtures of experts are left out, and said to be.
    """
    started = time.monotonic()
    loaded = loading.loaded(step.name, step.revision)
    model: Any = loaded.model
    model.to(loading.placed(settings.device))
    much = {"tokens": settings.tokens, "length": settings.window, "batch": 1 << 30, "seed": settings.seed}
    data = calibration_inputs(settings.text, model, loaded.text_tokenizer, **much)
    batch = {name: value.to(model.device) for name, value in data.batches[0].items()}
    found = [block for block in survey(model).blocks if not block.routed]
    if not found:
        raise ModelError(
            "no feed-forward block was found that is one function of its input",
            where=step.name,
            fix="see `surgery inspect`",
        )
    left_out = [block.path for block in survey(model).blocks if block.routed]
    small = {name: value[:2, :16] for name, value in batch.items()}
    with torch.no_grad():
        blocks = verify_all(model, found, lambda: model(**small))
    rows = _rows(model, blocks, batch, settings)
    seconds = round(time.monotonic() - started, 2)
    return {"blocks": rows, "left_out": left_out, "tokens": data.tokens, "seconds": seconds}


def _rows(
    model: Any, blocks: Sequence[Block], batch: dict[str, Tensor], settings: TraceSettings
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    sequences = len(next(iter(batch.values())))

    def look(block: Block, x: Tensor) -> None:
        original, x = block.weights(block.modules(model)).on_cpu(), x.cpu()
        even = torch.arange(x.shape[:-1].numel()) // max(1, x.shape[:-1].numel() // sequences) % 2 == 0
        flat = x.flatten(0, -2)
        size = original(flat).float().norm(dim=-1)
        ordinary = sinks.ordinary(size)
        found = approximations(original, flat[even & ordinary], flat[~even & ordinary], settings.degrees)
        rows.append({"path": block.path, "sinks": int((~ordinary).sum()), "r2": found})

    def hook(block: Block) -> Any:
        return lambda _, args: look(block, args[0].detach())

    entries = ((attribute(model, block.entry), block) for block in blocks)
    with torch.no_grad(), hooked(entry.register_forward_pre_hook(hook(block)) for entry, block in entries):
        model(**batch)
    return rows


def lines(report: dict[str, Any]) -> list[str]:
    """A table for a terminal: the mean over blocks, a line per checkpoint and degree."""
    out = [
        "mean R² over the blocks; N: the polynomial for N(μ, Σ), data: the one for the text's own moments",
        f"{'checkpoint':28}{'':12}{'N on N':>10}{'N on text':>12}{'data on text':>14}",
    ]
    for row in report["checkpoints"]:
        for degree in report["settings"]["degrees"]:
            one, two, three = (
                mean(row, degree, name) for name in ("gaussian_on_gaussian", "gaussian_on_text", "data_on_text")
            )
            out.append(f"{row['label'][:27]:28}{_name(degree):12}{one:10.4f}{two:12.4f}{three:14.4f}")
    left = sorted({path for row in report["checkpoints"] for path in row.get("left_out", ())})
    return out + [f"left out, as mixtures of experts: {', '.join(left)}"] * bool(left)


def _name(degree: int) -> str:
    return NAMES.get(degree, f"degree {degree}")


def mean(row: dict[str, Any], degree: int, name: str) -> float:
    """Over the blocks of one checkpoint."""
    values = [block["r2"][str(degree)][name] for block in row["blocks"]]
    return float(sum(values) / len(values))


def plot(report: dict[str, Any]) -> bytes:
    """R² by step: means as lines, single blocks as a shade; PNG."""
    try:
        import matplotlib as _  # noqa: F401
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SurgeryError("plots need matplotlib", fix="pip install 'polysurgery[explain]'") from error
    rows = report["checkpoints"]
    steps = [row["step"] for row in rows]
    x = list(range(len(rows))) if None in steps or len(set(steps)) < len(steps) else steps
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, caption in zip(
        panels, ("gaussian_on_gaussian", "data_on_text"), ("under N(μ, Σ)", "on held-out text"), strict=True
    ):
        for degree, colour in zip(report["settings"]["degrees"], COLOURS, strict=False):
            every = [[block["r2"][str(degree)][name] for block in row["blocks"]] for row in rows]
            axes.fill_between(
                x, [min(v) for v in every], [max(v) for v in every], color=colour, alpha=0.12, linewidth=0
            )
            means = [sum(v) / len(v) for v in every]
            axes.plot(x, means, "o-", color=colour, markersize=4, label=_name(degree))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set(title=caption, xlabel="step" if x is steps else "checkpoint", ylim=(-0.05, 1.02))
        if x is steps and max(x) > 100 * max(1, sorted(x)[min(1, len(x) - 1)]):
            axes.set_xscale("symlog")
    panels[0].set_ylabel("R² (mean; shade: all blocks)")
    panels[1].legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
