"""What a person at the terminal reads: tables and lines. Scripts use `--json`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from surgery.pipeline import Inspection
    from surgery.report import Report


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_blocks(seen: Inspection) -> None:
    rows = [
        [
            block.path, block.kind, block.activation, f"{block.width} → {block.hidden} → {block.out}",
            f"{block.parameters:,}", ", ".join(seen.forms(block)),
        ]
        for block in seen.survey.blocks
    ]  # fmt: skip
    _table(
        f"{seen.name}: {seen.architecture}, {len(rows)} feed-forward blocks",
        ["block", "kind", "activation", "widths", "parameters", "forms at degree 2"],
        rows,
    )
    for path, reason in seen.survey.left_alone:
        click.echo(f"left alone: {path}: {reason}")


def plan_text(planned: dict[str, Any]) -> str:
    recipe = planned["recipe"]
    lines = [
        f"model         {planned['model']} ({planned['architecture']})",
        f"blocks        {len(planned['convert'])} of {len(planned['blocks'])}",
        f"degree        {recipe['degree']} ({planned['coefficients_per_unit']} coefficients a unit)",
        f"optimum for   {recipe['assume']}, readout {recipe['readout']}, target {recipe['target']}",
        f"calibration   {recipe['calibration']}: {recipe['tokens']} tokens in sequences of {recipe['length']}, "
        f"{recipe['short']:.0%} of them in short ones",
        f"form          {planned['form']}",
        f"output        {recipe['output'] or '(none)'}",
    ]
    lines += [f"left alone    {item['path']}: {item['reason']}" for item in planned["left_alone"]]
    return "\n".join(lines)


def print_report(report: Report, output: str) -> None:
    rows = [
        [
            row["path"], f"{row['r2_held']:.4f}", f"{row['r2_fit']:.4f}", f"{row['r2_units_median']:.4f}",
            "-" if row["ridge"] is None else f"{row['ridge']:g}", f"{row['condition']:.1e}",
            f"{row['sink_tokens']}" + (f" ({row['sink_error']:.1%})" if row["sink_tokens"] else ""),
            f"{row['seconds']:.1f}",
        ]
        for row in report.blocks
    ]  # fmt: skip
    _table(
        f"{len(rows)} blocks, degree {report.recipe['degree']}, {report.calibration['tokens']:,} tokens of "
        f"{report.calibration['source']}",
        ["block", "R² held out", "R² fitted", "R² unit", "ridge", "condition", "sinks (error)", "s"],
        rows,
    )
    if report.perplexity:
        seen = report.perplexity
        click.echo(
            f"perplexity {seen['original']:.2f} → {seen['twin']:.2f} ({seen['nats']:+.4f} nats) on {seen['text']}"
        )
    for path, reason in report.left_alone:
        click.echo(f"left alone: {path}: {reason}")
    click.echo(f"{output}: {report.form} form, reloaded in a fresh process and compared")
