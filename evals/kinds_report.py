"""The comparison of kinds of text as people read it: a table and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals.report import AFTER, BEFORE, INK
from surgery.errors import EvaluationError
from surgery.runtime.files import replacing, write_json

JSON, PLOT = "texts.json", "texts.png"
SEEN = {"no": "", "kind": "its kind was seen", "text": "another part of it was seen"}


def write_kinds(found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes texts.json and texts.png; their paths. Raises EvaluationError where that cannot be done."""
    try:
        write_json(folder / JSON, found, allow_nan=False)
        draw_kinds(found, folder / PLOT)
    except OSError as error:
        raise EvaluationError(f"the comparison cannot be written: {error}", where=str(folder)) from error
    return [folder / JSON, folder / PLOT]


def interval(found: dict[str, Any]) -> str:
    """+0.123 [0.110, 0.140]"""
    bounds = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['value']:+.3f}{bounds}"


def kind_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per kind: its name, tokens, the original's nats, nats lost, KL, and whether it was seen."""
    return [
        (
            row["kind"],
            f"{row['tokens']:,}",
            f"{row['nats']['original']['value']:.3f}",
            interval(row["nats_lost"]),
            f"{row['divergence']['value']:.3f}",
            SEEN[row["seen"]],
        )
        for row in found["kinds"]
    ]


def unseen_line(found: dict[str, Any]) -> str:
    """Mean and worst over the kinds that the twin has not seen."""
    over = found["unseen"]
    if over is None:
        return "every kind measured was seen by the twin"
    return (
        f"over {over['kinds']} unseen kinds: {interval(over['mean'])} nats lost on average, "
        f"{over['worst']['value']:+.3f} on the worst ({over['worst']['kind']})"
    )


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
    axes.set_yticks(range(len(rows)), [row["kind"] + ("" if row["seen"] == "no" else " (seen)") for row in rows])
    if found["unseen"]:
        axes.axvline(found["unseen"]["mean"]["value"], color=INK, linestyle=":", label="mean of the unseen kinds")
        axes.legend(frameon=False, loc="lower right")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("nats lost per token")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
