"""The comparison of kinds of text as people read it: a table and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals.report import AFTER, BEFORE, INK
from surgery.errors import EvaluationError
from surgery.runtime.files import not_written, replacing, write_json
from surgery.runtime.public import as_label

JSON, PLOT = "texts.json", "texts.png"


def write_kinds(found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes texts.json and texts.png; their paths. Raises EvaluationError where that cannot be done."""
    try:
        write_json(folder / JSON, found, allow_nan=False)
        draw_kinds(found, folder / PLOT)
    except OSError as error:
        raise not_written(error, "the comparison cannot be written", folder) from error
    return [folder / JSON, folder / PLOT]


def draw_kinds(found: dict[str, Any], file: Path) -> None:
    """Nats lost on each kind with their intervals; unseen kinds in colour, with their mean as a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("the picture needs matplotlib", fix="pip install 'polysurgery[eval]'") from error
    rows = sorted(found["kinds"], key=lambda row: row["nats_lost"]["value"])
    figure = Figure(figsize=(6.4, 1.1 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        lost, colour = row["nats_lost"], AFTER if row["seen"] == "no" else BEFORE
        axes.barh(place, lost["value"], color=colour, height=0.62)
        if lost["low"] is not None:
            axes.plot([lost["low"], lost["high"]], [place, place], color=INK, linewidth=1)
    names = [as_label(row["kind"]) + ("" if row["seen"] == "no" else " (seen)") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    if found["unseen"]:
        axes.axvline(found["unseen"]["mean"]["value"], color=INK, linestyle=":", label="mean of the unseen kinds")
        axes.legend(frameon=False, loc="lower right")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("nats lost per token")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
