"""The evaluation as people and programs read it: evaluation.json, summary.md and one self-contained HTML page."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from surgery.errors import EvaluationError
from surgery.runtime.files import not_written, write_bytes, write_json, write_text
from surgery.runtime.public import as_label, in_markdown, public
from surgery.saving.evaluation import headline_rows, task_rows, trust_notes

JSON, MARKDOWN, PAGE, PLOT = "evaluation.json", "summary.md", "report.html", "blocks.png"
INK, BEFORE, AFTER, AFFINE = "#222222", "#9aa0a6", "#1f6feb", "#d29922"


def write_evaluation(report: dict[str, Any], folder: Path) -> None:
    """Writes :func:`files_of`, each under a temporary name first, none of which names a place on this machine.

    Raises EvaluationError where the disk refuses.
    """
    report = public(report)
    try:
        write_json(folder / JSON, report, allow_nan=False)
        write_text(folder / MARKDOWN, markdown(report))
        write_text(folder / PAGE, page(report))
        if report.get("blocks"):
            write_bytes(folder / PLOT, _drawn(_block_axes(report["blocks"]), 3.6, "png"))
    except OSError as error:
        raise not_written(error, "the report cannot be written", folder) from error


def files_of(report: dict[str, Any]) -> list[str]:
    """Names of what :func:`write_evaluation` writes."""
    return [JSON, MARKDOWN, PAGE, *([PLOT] if report.get("blocks") else [])]


def markdown(report: dict[str, Any]) -> str:
    """summary.md."""
    names = [in_markdown(report["models"][name]["name"]) for name in ("twin", "original")]
    lines = ["# " + " against ".join(names), ""]
    lines += _table(("", "original", "twin", "difference"), headline_rows(report))
    if rows := task_rows(report):
        lines += ["", *_table(("task", "metric", "original", "twin", "difference"), rows)]
    if blocks := report.get("blocks"):
        lines += ["", *_table(BLOCK_COLUMNS, block_cells(blocks))]
    lines += ["", *map(in_markdown, trust_notes(report))]
    return "\n".join(lines) + "\n"


BLOCK_COLUMNS = ("block", "R² on text", "R² of the best affine map", "FVU on text", "FVU under N(μ, Σ)")


def _four(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def block_cells(blocks: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row per block: path, R², R² of the affine fit, FVU, and FVU under a Gaussian."""
    return [
        (row["path"], f"{row['r2']:.4f}", f"{row['r2_affine']:.4f}", f"{row['fvu']:.4f}", _four(row["fvu_gaussian"]))
        for row in blocks
    ]


def _table(columns: tuple[str, ...], rows: list[Any]) -> list[str]:
    def line(cells: Any) -> str:
        return "| " + " | ".join(in_markdown(str(cell)) for cell in cells) + " |"

    return [line(columns), "|---" + "|---:" * (len(columns) - 1) + "|", *map(line, rows)]


def page(report: dict[str, Any]) -> str:
    """report.html: tables and plots, no network, no scripts."""
    try:
        import jinja2
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise EvaluationError("plots need matplotlib and jinja2", fix="pip install 'polysurgery[eval]'") from error
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    shown = {key: value for key, value in report.items() if key in ("settings", "models", "versions", "seconds")}
    rendered: str = (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        .from_string(template)
        .render(
            title=f"{report['models']['twin']['name']} against {report['models']['original']['name']}",
            headline=headline_rows(report), tasks=task_rows(report), block_columns=BLOCK_COLUMNS,
            blocks=block_cells(report.get("blocks") or []), notes=trust_notes(report),
            worst=(report.get("text") or {}).get("worst_tokens", []), plots=_plots(report),
            details=json.dumps(shown, indent=2),
        )
    )  # fmt: skip
    return rendered


def _plots(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(caption, SVG) pairs."""
    plots = []
    if blocks := report.get("blocks"):
        plots.append(("Variance each block leaves unexplained", _svg(_block_axes(blocks), 3.6)))
    if text := report.get("text"):
        plots.append(("Nats lost by position in the window", _position_plot(text["by_position"])))
    accuracies = [row for row in report.get("tasks") or () if 0 <= row["original"] <= 1 and 0 <= row["twin"] <= 1]
    if accuracies:
        plots.append(("Tasks before and after, with standard errors", _task_plot(accuracies)))
    return plots


def _drawn(draw: Any, height: float, kind: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "axes.edgecolor": INK}):
        figure = Figure(figsize=(9, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _svg(draw: Any, height: float) -> str:
    text = _drawn(draw, height, "svg").decode()
    return text[text.index("<svg") :]


def _block_axes(blocks: list[dict[str, Any]]) -> Any:
    def draw(axes: Any) -> None:
        place = range(len(blocks))
        series = (
            ("twin, on text", [row["fvu"] for row in blocks], AFTER, "o-"),
            ("twin, under N(μ, Σ)", [row["fvu_gaussian"] or math.nan for row in blocks], BEFORE, "o:"),
            ("best affine map, on text", [1 - row["r2_affine"] for row in blocks], AFFINE, "o--"),
        )
        for legend, values, colour, style in series:
            axes.plot(place, [max(value, 1e-6) for value in values], style, color=colour, label=legend, markersize=4)
        axes.set(yscale="log", xlabel="block", ylabel="FVU = 1 − R²")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)

    return draw


def _position_plot(rows: list[dict[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        labels = [f"{row['from']}–{row['to']}" if row["to"] > row["from"] else str(row["from"]) for row in rows]
        axes.bar(labels, [row["nats_lost"] for row in rows], color=AFTER)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="position in the window", ylabel="nats lost per token")
        axes.tick_params(axis="x", rotation=30)

    return _svg(draw, 3.2)


def _task_plot(rows: list[dict[str, Any]]) -> str:
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

    return _svg(draw, 1.2 + 0.45 * len(rows))
