"""What the report says of a refinement."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from surgery.calibration.samples import DRAWN_AS
from surgery.calibration.texts import label
from surgery.models import loading
from surgery.refining.packing import PackedWindows
from surgery.refining.sequence import TrainingWindows
from surgery.refining.settings import RefineSettings
from surgery.refining.training import Training

HASHED_TOGETHER = 4096  # windows


def run_key(
    settings: RefineSettings,
    report: dict[str, Any],
    held: dict[str, PackedWindows],
    windows: TrainingWindows,
    processes: int,
) -> dict[str, Any]:
    """What an interrupted run must share with this one to be gone on with: settings, the twin's weights, the text."""
    return {
        **asdict(settings),
        "report_to": None,
        "checkpointing": None,
        "device": None,
        "processes": processes,
        "weights": report["verification"]["weights"],
        "held": {name: _fingerprint(part) for name, part in held.items()},
        "windows": _fingerprint(windows.texts),
        "drawn_as": DRAWN_AS if windows.own else None,
    }


def _fingerprint(windows: PackedWindows) -> str:
    digest = hashlib.sha256()
    for part in windows.split(HASHED_TOGETHER):
        digest.update(part.ids.numpy().tobytes())
    return digest.hexdigest()


def record_of(
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
        "settings": shown | {"original": loading.public_name(settings.original, loading.locate(settings.original)[2])},
        "processes": run.accelerator.num_processes,
        "trained_parameters": sum(value.numel() for value in run.trainable.values()),
        "tokens_seen": run.tokens_seen,
        "passes_over_the_text": round(run.tokens_seen / (len(run.windows) * run.windows.length), 2),
        "held_out": ranges,
        "seconds": round(run.seconds, 1),
        "drawing_seconds": round(run.windows.drawing_seconds, 1),
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
        if value == field.default or field.name in ("twin", "original", "output", "text", "report_to", "device"):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)
