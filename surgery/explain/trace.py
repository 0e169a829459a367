"""How polynomial a model's blocks are, through its training: `surgery trace`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery import loading
from surgery.blocks import Block, attribute, survey
from surgery.calibration import prepare
from surgery.checkpoint import write_json
from surgery.confirm import confirm
from surgery.errors import CheckpointError, ModelError, RecipeError, SurgeryError
from surgery.explain.approximation import approximations
from surgery.features import Original
from surgery.sinks import MASSIVE

FORMAT = 1
JSON, PLOT = "trace.json", "trace.png"
NAMES = {1: "linear", 2: "quadratic", 3: "cubic"}
COLOURS = ("#d29922", "#1f6feb", "#8250df", "#1a7f37")


@dataclass(frozen=True)
class TraceSettings:
    """What is measured at every checkpoint; the options of the same names."""

    degrees: tuple[int, ...] = (1, 2)
    text: str = "python"
    tokens: int = 4096
    window: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Checkpoint:
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


def settings(degrees: str, **rest: Any) -> TraceSettings:
    """Settings from the command line's words. Raises RecipeError for degrees that are no numbers from 1 to 9."""
    words = [word.strip() for word in degrees.split(",")]
    if not all(word.isdigit() and 1 <= int(word) <= 9 for word in words):
        raise RecipeError(f"no degrees {degrees!r}", fix="numbers from 1 to 9 with commas between, as in 1,2")
    return TraceSettings(tuple(sorted({int(word) for word in words})), **rest)


def checkpoints(names: Sequence[str], revisions: str | None) -> list[Checkpoint]:
    """What to trace. Raises RecipeError unless it is several folders, or one model with several revisions."""
    if revisions is None:
        return [Checkpoint(name, None) for name in names]
    if len(names) != 1:
        raise RecipeError("--revisions goes with one model", fix="surgery trace MODEL --revisions step0,step1000")
    return [Checkpoint(names[0], revision.strip()) for revision in revisions.split(",") if revision.strip()]


def trace(
    moments: Sequence[Checkpoint],
    settings: TraceSettings,
    folder: Path | None,
    restart: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """R² of the closed-form approximants of every block at every checkpoint; what `trace.json` holds.

    Finished checkpoints are kept in the folder and not measured again; those not asked for now stand under `others`.

    Raises:
        SurgeryError: nothing to trace, a checkpoint that does not load, a folder that belongs to other settings.
    """
    if not moments:
        raise RecipeError("no checkpoints were named")
    described = json.loads(json.dumps(asdict(settings)))
    known = {} if folder is None or restart else _known(folder, described)
    report: dict[str, Any] = {"format": FORMAT, "settings": described, "checkpoints": []}
    from tqdm import tqdm

    for moment in tqdm(moments, desc="tracing", unit="checkpoint", disable=quiet):
        row = known.pop(moment.key, None) or {
            "key": moment.key, "label": moment.label, "step": moment.step, **measure(moment, settings),
        }  # fmt: skip
        report["checkpoints"].append(row)
        if folder is not None:
            _write(folder, {**report, "others": list(known.values())})
    if folder is not None:
        temporary = folder / f".{PLOT}.tmp"
        temporary.write_bytes(plot(report))
        os.replace(temporary, folder / PLOT)
    return report


def _known(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    file = folder / JSON
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("settings") != wanted:
        raise CheckpointError(
            "an earlier trace with other settings is here", where=str(folder),
            fix="repeat its command, choose another -o, or give --restart to discard it",
        )  # fmt: skip
    return {row["key"]: row for row in (*found["checkpoints"], *found["others"])}


def _write(folder: Path, report: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / JSON, report)
    except OSError as error:
        raise CheckpointError(f"the trace cannot be written: {error}", where=str(folder)) from error


def measure(moment: Checkpoint, settings: TraceSettings) -> dict[str, Any]:
    """One checkpoint: a row per block, in one forward pass over the text; no hidden states are kept."""
    started = time.monotonic()
    loaded = loading.load(moment.name, moment.revision)
    model: Any = loaded.model
    data = prepare(
        settings.text, model, loaded.tokenizer,
        tokens=settings.tokens, length=settings.window, batch=1 << 30, seed=settings.seed,
    )  # fmt: skip
    batch = {name: value.to(model.device) for name, value in data.batches[0].items()}
    found = survey(model)
    if not found.blocks:
        raise ModelError("no feed-forward block was found", where=moment.name, fix="see `surgery inspect`")
    small = {name: value[:2, :16] for name, value in batch.items()}
    with torch.no_grad():
        blocks = confirm(model, found.blocks, lambda: model(**small))
    rows = _rows(model, blocks, batch, settings)
    return {"blocks": rows, "tokens": data.tokens, "seconds": round(time.monotonic() - started, 2)}


def _rows(
    model: Any, blocks: Sequence[Block], batch: dict[str, Tensor], settings: TraceSettings
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    sequences = len(next(iter(batch.values())))

    def look(block: Block, x: Tensor) -> None:
        paths = (*block.first, block.last, block.activation_path)
        original = Original.of(block, {path: attribute(model, path) for path in paths if path})
        even = torch.arange(x.shape[:-1].numel(), device=x.device) // max(1, x.shape[:-1].numel() // sequences) % 2 == 0
        flat = x.flatten(0, -2)
        size = original(flat).float().norm(dim=-1)
        ordinary = size <= MASSIVE * size.median()
        found = approximations(original, flat[even & ordinary], flat[~even & ordinary], settings.degrees)
        rows.append({"path": block.path, "sinks": int((~ordinary).sum()), "r2": found})

    def hook(block: Block) -> Any:
        return lambda _, args: look(block, args[0].detach())

    handles = [attribute(model, block.entry).register_forward_pre_hook(hook(block)) for block in blocks]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
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
    return out


def _name(degree: int) -> str:
    return NAMES.get(degree, f"degree {degree}")


def mean(row: dict[str, Any], degree: int, name: str) -> float:
    """Over the blocks of one checkpoint."""
    values = [block["r2"][str(degree)][name] for block in row["blocks"]]
    return float(sum(values) / len(values))


def plot(report: dict[str, Any]) -> bytes:
    """R² by step: means as lines, single blocks as a shade; PNG."""
    import io

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
