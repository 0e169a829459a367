"""The evaluation as people and programs read it: evaluation.json, summary.md and one self-contained HTML page."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

from evals.text import EvaluationError
from surgery.texts import label

JSON, MARKDOWN, PAGE, PLOT = "evaluation.json", "summary.md", "report.html", "blocks.png"
INK, BEFORE, AFTER, AFFINE = "#222222", "#9aa0a6", "#1f6feb", "#d29922"


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes the three files, each under a temporary name first. Raises EvaluationError where the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            JSON: json.dumps(report, indent=2, allow_nan=False) + "\n",
            MARKDOWN: markdown(report),
            PAGE: page(report),
        }
        for name, content in contents.items():
            temporary = folder / f".{name}.tmp"
            temporary.write_text(content, encoding="utf-8")
            os.replace(temporary, folder / name)
        if report.get("blocks"):
            (folder / PLOT).write_bytes(_drawn(_block_axes(report["blocks"]), 3.6, "png"))
    except OSError as error:
        raise EvaluationError(f"the report cannot be written: {error}", where=str(folder)) from error


def headline(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (measure, original, twin, difference) of what a reader looks for first."""
    rows: list[tuple[str, ...]] = []
    if text := report.get("text"):
        lost, nats, perplexity = text["nats_lost"], text["nats"], text["perplexity"]
        span = f" [{lost['low']:+.4f}, {lost['high']:+.4f}]" if lost["low"] is not None else ""
        rows += [
            ("perplexity", f"{perplexity['original']:.3f}", f"{perplexity['twin']:.3f}", ""),
            ("nats per token", *(f"{nats[name]['value']:.4f}" for name in ("original", "twin")),
             f"{lost['value']:+.4f}{span}"),
        ]  # fmt: skip
        if bits := text.get("bits_per_byte"):
            change = bits["twin"] - bits["original"]
            rows.append(("bits per byte", f"{bits['original']:.4f}", f"{bits['twin']:.4f}", f"{change:+.4f}"))
        rows.append(("KL(original ‖ twin), nats", "", f"{text['divergence']['value']:.4f}", ""))
        rows.append(("same first choice", "", f"{text['top1_agreement']['value']:.1%}", ""))
    if outputs := report.get("outputs"):
        rows.append(("cosine of outputs, mean", "", f"{outputs['cosine']['mean']:.5f}", ""))
        rows.append(("relative error of outputs, mean", "", f"{outputs['relative_error']['mean']:.4f}", ""))
    if speed := report.get("speed"):
        for kind in ("prefill", "decode"):
            found = speed[f"{kind}_tokens_per_second"]
            span = f"× {found['ratio']:.2f} [{found['ratio_low']:.2f}, {found['ratio_high']:.2f}]"
            rows.append((f"{kind}, tokens per second", f"{found['original']:.1f}", f"{found['twin']:.1f}", span))
        for name, unit, scale in (
            ("flops_per_token", "MFLOPs per token", 1e6),
            ("parameters", "million parameters", 1e6),
        ):
            one, two = speed[name]["original"] / scale, speed[name]["twin"] / scale
            rows.append((unit, f"{one:.1f}", f"{two:.1f}", f"× {two / one:.3f}"))
        size = speed["weight_bytes"]
        if size["original"] and size["twin"]:
            rows.append(("weight files, MiB", *(f"{size[n] / 2**20:.1f}" for n in ("original", "twin")), ""))
    return rows


def task_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows (task, metric, original, twin, difference ± standard error)."""

    def value(row: dict[str, Any], name: str) -> str:
        error = row[f"{name}_stderr"]
        return f"{row[name]:.4f}" + (f" ± {error:.4f}" if isinstance(error, int | float) else "")

    rows = []
    for row in report.get("tasks") or ():
        error = row["difference_stderr"]
        change = f"{row['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
        rows.append((row["task"], row["metric"].partition(",")[0], value(row, "original"), value(row, "twin"), change))
    return rows


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know to trust the figures."""
    lines = []
    if text := report.get("text"):
        lines.append(
            f"Text: {text['source']}, {text['tokens']:,} tokens predicted in windows of {text['window']}, stride "
            f"{text['stride']}. Brackets are 95 % bootstrap intervals over {text['windows']} windows, paired."
        )
        conversion = (report["models"]["twin"] or {}).get("conversion")
        used = conversion["calibration"] if conversion else {"source": None, "tokens": 0}
        refined = ((conversion or {}).get("refined_on") or {}).get(label(text["source"]))
        if refined:
            first, last = report["settings"]["skip"], report["settings"]["skip"] + report["settings"]["tokens"]
            outside = (first >= refined["begin"] and last <= refined["end"]) or first >= refined["read"]
            lines.append(
                f"The twin was refined on this text, all but tokens {refined['begin']:,} to {refined['end']:,}; "
                + ("they alone were measured." if outside else "part of what was measured here was SEEN IN TRAINING.")
            )
        elif used["source"] == text["source"]:
            seen = report["settings"]["skip"] < used["tokens"]
            lines.append(
                f"The twin was calibrated on the first {used['tokens']:,} tokens of this text; "
                + ("part of what was measured here was SEEN BY THE FIT." if seen else "they were passed over.")
            )
    misled = [row for row in report.get("blocks") or () if row["gaussian_misleads"]]
    if misled:
        worst = max(misled, key=lambda row: abs(math.log(max(row["fvu"], 1e-12) / max(row["fvu_gaussian"], 1e-12))))
        lines.append(
            f"In {len(misled)} blocks the unexplained variance on text differs from that under the fitted Gaussian "
            f"by more than a factor of two ({worst['path']}: {worst['fvu']:.4f} against {worst['fvu_gaussian']:.4f}). "
            "Trust the one on text."
        )
    if report.get("tasks") and report["settings"]["task_settings"]["limit"]:
        lines.append("Tasks were run on a part of their documents (--limit): for orientation only.")
    if report["reused"]:
        lines.append("Reused from earlier runs with the same models and settings: " + ", ".join(report["reused"]) + ".")
    return lines


def markdown(report: dict[str, Any]) -> str:
    """summary.md."""
    lines = [f"# {report['models']['twin']['name']} against {report['models']['original']['name']}", ""]
    lines += _table(("", "original", "twin", "difference"), headline(report))
    if rows := task_rows(report):
        lines += ["", *_table(("task", "metric", "original", "twin", "difference"), rows)]
    if blocks := report.get("blocks"):
        lines += ["", *_table(BLOCK_COLUMNS, block_cells(blocks))]
    lines += ["", *notes(report)]
    return "\n".join(lines) + "\n"


BLOCK_COLUMNS = ("block", "R² on text", "R² of the best affine map", "FVU on text", "FVU under N(μ, Σ)")


def _four(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def block_cells(blocks: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (row["path"], f"{row['r2']:.4f}", f"{row['r2_affine']:.4f}", f"{row['fvu']:.4f}", _four(row["fvu_gaussian"]))
        for row in blocks
    ]


def _table(columns: tuple[str, ...], rows: list[Any]) -> list[str]:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

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
            headline=headline(report), tasks=task_rows(report), block_columns=BLOCK_COLUMNS,
            blocks=block_cells(report.get("blocks") or []), notes=notes(report),
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
        axes.set_yticks(list(place), [f"{row['task']} ({row['metric'].partition(',')[0]})" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(axis="x", alpha=0.3)
        axes.legend(frameon=False)

    return _svg(draw, 1.2 + 0.45 * len(rows))
