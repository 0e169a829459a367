"""The evaluation as people and programs read it: evaluation.json, summary.md and one self-contained HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evals import plots
from surgery.errors import EvaluationError
from surgery.runtime.files import not_written, write_bytes, write_json, write_text
from surgery.runtime.public import in_markdown, public
from surgery.saving.evaluation import (
    KIND_COLUMNS,
    headline_rows,
    kind_rows,
    sentence,
    task_rows,
    trust_notes,
    unseen_line,
)

JSON, MARKDOWN, PAGE, PLOT, KINDS_PLOT = "evaluation.json", "summary.md", "report.html", "blocks.png", "texts.png"


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
            write_bytes(folder / PLOT, plots.png(*plots.blocks(report["blocks"])))
        if report.get("kinds"):
            write_bytes(folder / KINDS_PLOT, plots.png(*plots.kinds(report["kinds"])))
    except OSError as error:
        raise not_written(error, "the report cannot be written", folder) from error


def files_of(report: dict[str, Any]) -> list[str]:
    """Names of what :func:`write_evaluation` writes."""
    pictures = {"blocks": PLOT, "kinds": KINDS_PLOT}
    return [JSON, MARKDOWN, PAGE, *(file for part, file in pictures.items() if report.get(part))]


def markdown(report: dict[str, Any]) -> str:
    """summary.md."""
    names = [in_markdown(report["models"][name]["name"]) for name in ("twin", "original")]
    lines = ["# " + " against ".join(names), ""]
    if kinds := report.get("kinds"):
        lines += [in_markdown(sentence(unseen_line(kinds))) + ".", "", *_table(KIND_COLUMNS, kind_rows(kinds)), ""]
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
    kinds = report.get("kinds")
    shown = {key: value for key, value in report.items() if key in ("settings", "models", "versions", "seconds")}
    rendered: str = (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        .from_string(template)
        .render(
            title=f"{report['models']['twin']['name']} against {report['models']['original']['name']}",
            kind_columns=KIND_COLUMNS, kinds=kind_rows(kinds) if kinds else [],
            over_kinds=sentence(unseen_line(kinds)) if kinds else "",
            headline=headline_rows(report), tasks=task_rows(report), block_columns=BLOCK_COLUMNS,
            blocks=block_cells(report.get("blocks") or []), notes=trust_notes(report),
            worst=(report.get("text") or {}).get("worst_tokens", []), plots=_plots(report),
            details=json.dumps(shown, indent=2),
        )
    )  # fmt: skip
    return rendered


def _plots(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(caption, SVG) pairs."""
    found = []
    if kinds := report.get("kinds"):
        found.append(("Nats lost on each kind of text", plots.svg(*plots.kinds(kinds))))
    if blocks := report.get("blocks"):
        found.append(("Variance each block leaves unexplained", plots.svg(*plots.blocks(blocks))))
    if text := report.get("text"):
        found.append(("Nats lost by position in the window", plots.svg(*plots.positions(text["by_position"]))))
    accuracies = [row for row in report.get("tasks") or () if 0 <= row["original"] <= 1 and 0 <= row["twin"] <= 1]
    if accuracies:
        found.append(("Tasks before and after, with standard errors", plots.svg(*plots.tasks(accuracies))))
    return found
