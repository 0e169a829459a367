"""What a person at the terminal reads: tables and lines. Scripts use `--json`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from surgery.runtime.public import printable

if TYPE_CHECKING:
    from evals.settings import EvalSettings
    from surgery.conversion.inspection import Inspection
    from surgery.saving.report import Report


def echo(text: str, err: bool = False) -> None:
    """A line; what came from a checkpoint or a server does nothing to the terminal."""
    click.echo(printable(text), err=err)


def refinement_plan(planned: dict[str, Any]) -> str:
    """`surgery refine --dry-run`."""
    settings, predictions = planned["settings"], planned["predictions_bytes"]
    disk = [f"disk: at most {predictions / 2**30:.2f} GiB for the original's predictions"] if predictions else []
    return "\n".join(
        (
            f"{settings['twin']} → {settings['output']}, distilled from {settings['original']}",
            f"{planned['steps']:,} steps of {planned['tokens_a_step']:,} tokens of {', '.join(settings['text'])}",
            f"trained: {settings['train']}, {planned['trained_parameters']:,} of {planned['parameters']:,} parameters",
            f"memory: {planned['bytes_at_least'] / 2**30:.2f} GiB and the activations",
            *disk,
        )
    )


def refinement_lines(record: dict[str, Any]) -> list[str]:
    """What a refinement did."""
    lines = [
        f"nats lost on {record['held_out_tokens']:,} held-out tokens: {record['lost_before']:+.4f} before, "
        f"{record['lost_after']:+.4f} after {record['tokens_seen']:,} tokens in {record['seconds']:.0f} s",
        f"KL to the original: {record['divergence_before']:.4f} before, {record['divergence_after']:.4f} after",
        f"memory saved by sharing tensors with the teacher: {record['shared_bytes'] / 2**20:,.0f} MiB",
    ]
    if record["control"]:
        change = record["control"]["nats_after"] - record["control"]["nats_before"]
        lines.append(f"the original, trained alike on the text itself: {change:+.4f} nats on the same tokens")
    return lines


def refinement_warnings(record: dict[str, Any]) -> list[str]:
    """What must not be overlooked."""
    lines = []
    if record["best_step"] == 0:
        lines.append("WARNING: nothing was gained; the twin saved is the one this run started from")
    elif record["lost_after"] > record["lost_before"]:
        lines.append("WARNING: nearer to the original's predictions, but WORSE on held-out text than before")
    if record["skipped_steps"]:
        lines.append(f"WARNING: {record['skipped_steps']} steps were not finite and were skipped")
    return lines


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=printable(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if column == "block" or index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False).print(table)


def print_blocks(seen: Inspection) -> None:
    """`surgery inspect`."""
    rows = [
        [
            str(number), block.path, block.kind, block.activation, f"{block.width} → {block.hidden} → {block.out}",
            f"{block.parameters:,}", ", ".join(seen.forms(block)),
        ]
        for number, block in enumerate(seen.survey.blocks)
    ]  # fmt: skip
    print_table(
        f"{seen.name}: {seen.architecture}, {len(rows)} feed-forward blocks",
        ["", "block", "kind", "activation", "widths", "parameters", "forms at degree 2"],
        rows,
    )
    if seen.note:
        echo(seen.note)
    for path, reason in seen.survey.left_alone:
        echo(f"left alone: {path}: {reason}")


def print_run_plan(planned: dict[str, Any]) -> None:
    """`surgery run --dry-run`."""
    from surgery.runs.estimate import as_rows, sized, spoken

    title = f"{planned['recipe']}: {planned['model']} → {planned['output']}"
    print_table(title, ["stage", "twin", "why", "time"], [list(row) for row in as_rows(planned)])
    known = [row["seconds"] for row in planned["stages"] if row["why"] and row["seconds"] is not None]
    total = f"in all {spoken(sum(known))} on this machine, a rough guess" if known else "nothing to do"
    echo(f"{planned['parameters']:,} parameters; {total}")
    echo(
        f"disk: {sized(planned['bytes'])} for the twins, {sized(planned['free'])} free; "
        f"memory: {sized(planned['memory'])} at least"
    )


def export_line(seen: dict[str, Any]) -> str:
    """What an export came to."""
    if seen["form"] == "delta":
        share = seen["bytes"] / seen["twin_bytes"]
        return f"{seen['bytes']:,} bytes, {share:.2%} of the twin; applied to the original it gives every bit of it"
    if seen["form"] == "onnx":
        operators = ", ".join(seen["operators"])
        return f"ONNX graph, differs by {seen['difference']:.1e} in onnxruntime; operators {operators}"
    if seen["form"] == "encrypted":
        return _when_encrypted(seen)
    if seen["form"] == "gguf":
        return f"{seen['file']}, {seen['bytes']:,} bytes; {_in_engine(seen)}"
    return f"{seen['form']} form, reloaded in a fresh process, difference {seen['difference']:.1e}"


def _when_encrypted(seen: dict[str, Any]) -> str:
    ranges = f"at most {seen['values_out']:.2%} of a block's values beyond their range on unseen text"
    room = f"the largest has room for {seen['margin']:,.0f} times more"
    if seen["engine"] is None:
        how = f"scaled, relative error {seen['difference']:.1e} (not run encrypted: pip install tenseal)"
    else:
        sizes = ", ".join(f"{name} {size:,}" for name, size in seen["bytes"].items())
        how = (
            f"{seen['worst']} encrypted by {seen['engine']}: relative error {seen['difference']:.1e}, "
            f"{seen['seconds']['compute']:.1f} s a token; bytes: {sizes}"
        )
    return f"{seen['blocks']} blocks; {ranges}, {room}; {how}"


def _in_engine(seen: dict[str, Any]) -> str:
    if seen["engine"] is None:
        return f"read back, relative error {seen['difference']:.1e} (not run: pip install xllamacpp)"
    text = "the same greedy text" if seen["same_text"] else "another greedy text"
    tokens = "" if seen["same_tokens"] else "; transformers cuts text into other tokens than llama.cpp"
    return f"{text} in {seen['engine']}, log-probabilities differ by {seen['difference']:.1e}{tokens}"


def evaluation_plan(planned: EvalSettings, processes: int) -> str:
    """`surgery eval --dry-run`."""
    rows = {
        "twin": planned.twin,
        "original": planned.original,
        "text": f"{planned.text}: {planned.tokens} tokens after {planned.skip}, windows of {planned.window}, "
        f"stride {planned.stride or planned.window}",
        "blocks": f"on {planned.block_tokens} tokens",
        "tasks": ", ".join(planned.tasks) or "(none)",
        "speed": "yes" if planned.speed else "no",
        "processes": processes,
    }
    return "\n".join(f"{name:10} {value}" for name, value in rows.items())


def source_name(given: Any) -> str:
    """Calibration sources, for a person."""
    if given == "auto":
        return "broad, or the model's own samples where that cannot be fetched"
    if isinstance(given, dict):
        return ", ".join(f"{source}={share:g}" for source, share in given.items())
    return given if isinstance(given, str) else ", ".join(given)


def plan_text(planned: dict[str, Any]) -> str:
    """`surgery convert --dry-run`."""
    from surgery.runs.estimate import sized, spoken

    recipe, cost = planned["recipe"], planned["cost"]
    short = "a part" if recipe["short"] is None else f"{recipe['short']:.0%}"
    lines = [
        f"model         {planned['model']} ({planned['architecture']})",
        f"blocks        {len(planned['convert'])} of {len(planned['blocks'])}",
        f"degree        {recipe['degree']} ({planned['coefficients_per_unit']} coefficients a unit)"
        if recipe["budget"] is None
        else f"degree        2, 3 or the original, within {recipe['budget']} nats",
        f"optimum for   {recipe['assume']}, readout {recipe['readout']}, target {recipe['target']}",
        f"text          {source_name(recipe['text'])}: "
        f"{recipe['tokens']:,} tokens in windows of {recipe['window']}, "
        f"{short} of them in short ones, {recipe['random_tokens']:.0%} replaced by random ones",
        f"form          {planned['form']}",
        f"output        {recipe['output'] or '(none)'}",
        f"takes         {spoken(cost['seconds'])} in one process here, and {sized(cost['memory'])} of memory, "
        f"counted from shapes; {sized(cost['disk'])} on disk",
    ]
    if recipe["units"] < 1:
        lines.insert(3, f"units         {recipe['units']:.0%} of each block's, the most useful ones")
    lines += [f"left alone    {item['path']}: {item['reason']}" for item in planned["left_alone"]]
    return "\n".join(lines)


def budget_lines(budget: dict[str, Any]) -> list[str]:
    """What each block costs alone, and what was chosen."""
    names = {2: "degree 2", 3: "degree 3", 0: "original"}
    width = max(len(cost["path"]) for cost in budget["costs"])
    lines = [f"{'KL, block alone':{width}}  degree 2  degree 3  chosen"]
    for cost in budget["costs"]:
        two, three = cost["divergence"][2], cost["divergence"][3]
        lines.append(f"{cost['path']:{width}}  {two:8.4f}  {three:8.4f}  {names[budget['degrees'][cost['path']]]}")
    counts = list(budget["degrees"].values())
    return [
        *lines,
        f"{counts.count(2)} quadratic, {counts.count(3)} cubic, {counts.count(0)} original: {budget['measured']:+.4f} "
        f"of {budget['nats']} nats (the divergences add up to {budget['predicted']:.4f})",
    ]


def print_report(report: Report, output: str) -> None:
    """`surgery convert`: a row per block, and what the whole twin cost."""
    rows = [
        [
            row["path"], str(row["degree"]),
            f"{row['r2_held']:.4f}", f"{row['r2_fit']:.4f}", f"{row['r2_units_median']:.4f}",
            "-" if row["ridge"] is None else f"{row['ridge']:g}", f"{row['condition']:.1e}",
            f"{row['sink_tokens']}" + (f" ({row['sink_error']:.1%})" if row["sink_tokens"] else ""),
            f"{row['seconds']:.1f}",
        ]
        for row in report.blocks
    ]  # fmt: skip
    print_table(
        f"{len(rows)} blocks, {report.calibration['tokens']:,} tokens of {report.calibration['source']}",
        ["block", "degree", "R² held out", "R² fitted", "R² unit", "ridge", "condition", "sinks (error)", "s"],
        rows,
    )
    if report.budget:
        echo("\n".join(budget_lines(report.budget)))
    if report.perplexity:
        seen = report.perplexity
        echo(f"perplexity {seen['original']:.2f} → {seen['twin']:.2f} ({seen['nats']:+.4f} nats) on {seen['text']}")
    if report.calibration["note"]:
        echo(f"note: {report.calibration['note']}", err=True)
    for path, reason in report.left_alone:
        echo(f"left alone: {path}: {reason}")
    echo(f"{output}: {report.form} form, reloaded in a fresh process and compared")
