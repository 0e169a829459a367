"""The pictures of an evaluation. Each is a function that draws on axes, and the height it wants in inches."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from evals.kinds import unseen_by_all
from surgery.errors import EvaluationError
from surgery.runtime.public import as_label

INK, BEFORE, AFTER, AFFINE = "#222222", "#9aa0a6", "#1f6feb", "#d29922"
WIDTH = 9.0  # inches
Draw = Callable[[Any], None]


def png(draw: Draw, height: float) -> bytes:
    """The picture as a file."""
    return _drawn(draw, height, "png")


def svg(draw: Draw, height: float) -> str:
    """The picture for a page."""
    text = _drawn(draw, height, "svg").decode()
    return text[text.index("<svg") :]


def _drawn(draw: Draw, height: float, kind: str) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("pictures need matplotlib", fix="pip install 'polysurgery[eval]'") from error
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "axes.edgecolor": INK}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def blocks(rows: list[dict[str, Any]]) -> tuple[Draw, float]:
    """FVU of every block: on text, under a Gaussian, and of the best affine map."""

    def draw(axes: Any) -> None:
        place = range(len(rows))
        series = (
            ("twin, on text", [row["fvu"] for row in rows], AFTER, "o-"),
            ("twin, under N(μ, Σ)", [row["fvu_gaussian"] or math.nan for row in rows], BEFORE, "o:"),
            ("best affine map, on text", [1 - row["r2_affine"] for row in rows], AFFINE, "o--"),
        )
        for legend, values, colour, style in series:
            axes.plot(place, [max(value, 1e-6) for value in values], style, color=colour, label=legend, markersize=4)
        axes.set(yscale="log", xlabel="block", ylabel="FVU = 1 − R²")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)

    return draw, 3.6


def positions(rows: list[dict[str, Any]]) -> tuple[Draw, float]:
    """Nats lost by position in the window."""

    def draw(axes: Any) -> None:
        labels = [f"{row['from']}–{row['to']}" if row["to"] > row["from"] else str(row["from"]) for row in rows]
        axes.bar(labels, [row["nats_lost"] for row in rows], color=AFTER)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="position in the window", ylabel="nats lost per token")
        axes.tick_params(axis="x", rotation=30)

    return draw, 3.2


def tasks(rows: list[dict[str, Any]]) -> tuple[Draw, float]:
    """Both models' results on every task, with standard errors."""

    def draw(axes: Any) -> None:
        place = range(len(rows))
        for shift, name, colour in ((-0.15, "original", BEFORE), (0.15, "twin", AFTER)):
            errors = [row[f"{name}_stderr"] if isinstance(row[f"{name}_stderr"], int | float) else 0 for row in rows]
            axes.errorbar(
                [row[name] for row in rows], [p + shift for p in place], xerr=errors, fmt="o", color=colour, label=name
            )
        names = [as_label(f"{row['task']} ({row['metric'].partition(',')[0]})") for row in rows]
        axes.set_yticks(list(place), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(axis="x", alpha=0.3)
        axes.legend(frameon=False)

    return draw, 1.2 + 0.45 * len(rows)


def kinds(found: dict[str, Any]) -> tuple[Draw, float]:
    """Nats lost on each kind of text with its interval; unseen kinds in colour, with their mean as a line."""
    rows = sorted(found["kinds"], key=lambda row: row["nats_lost"]["value"])

    def draw(axes: Any) -> None:
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
        axes.set_xlabel("nats lost per token (0: the original)")

    return draw, 1.1 + 0.32 * len(rows)


def twins(compared: Sequence[tuple[str, dict[str, Any]]]) -> tuple[Draw, float]:
    """Several twins of one model on the same kinds of text, the original's level as a line.

    Args:
        compared: (name of the twin, what :func:`evals.kinds.compare_kinds` found) each; their mean is over the kinds
            that none of them has seen.
    """
    unseen = unseen_by_all(found for _, found in compared)

    def draw(axes: Any) -> None:
        place = range(len(compared))
        names = [row["kind"] for row in compared[0][1]["kinds"]]
        for number, kind in enumerate(names):
            rows = [next(row for row in found["kinds"] if row["kind"] == kind) for _, found in compared]
            values = [row["nats_lost"]["value"] for row in rows]
            style, width = ("o-", 1.6) if kind in unseen else ("o:", 1.1)
            label = as_label(kind) + ("" if kind in unseen else " (seen)")
            axes.plot(place, values, style, color=f"C{number % 10}", linewidth=width, markersize=5, label=label)
        axes.axhline(0, color=INK, linewidth=1.4, label="the original")
        worst = max(row["nats_lost"]["value"] for _, found in compared for row in found["kinds"])
        for spot, (_, found) in enumerate(compared):
            over = [row["nats_lost"]["value"] for row in found["kinds"] if row["kind"] in unseen]
            if over:
                text = f"mean {sum(over) / len(over):+.3f}"
                top = max(row["nats_lost"]["value"] for row in found["kinds"])
                axes.annotate(text, (spot + 0.05, top + 0.02 * worst), ha="left", va="bottom", color=INK)
        axes.set_xticks(list(place), [as_label(name) for name, _ in compared])
        axes.set_xlim(-0.4, len(compared) - 0.1)  # room for the last mean
        axes.set_ylim(top=1.12 * worst)
        axes.set_ylabel("nats lost per token")
        axes.grid(axis="y", alpha=0.3)
        axes.figure.legend(frameon=False, loc="outside right upper")

    return draw, 4.2
