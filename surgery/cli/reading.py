"""`surgery explain` and `surgery trace`."""

from __future__ import annotations

import json
from typing import Any

import click

from surgery.cli import terminal


@click.command()
@click.argument("twin")
@click.option("--block", type=terminal.COUNT, required=True, help="Its number, as `surgery inspect` counts.")
@click.option("--expert", type=terminal.COUNT, help="Which expert of it, where the block is a mixture.")
@click.option(
    "--output",
    "direction",
    help="Direction of the block's output: token:TEXT, neuron:BLOCK.UNIT, coordinate:I, class:I, file:PATH, linear:K "
    "or quadratic:K.  [default: list the block's own]",
)
@click.option("--minus", help="A direction to subtract, as in the difference of two logits.")
@click.option("--pairs", type=terminal.count(1), default=6, show_default=True, help="Eigenpairs to show.")
@click.option(
    "--coordinates",
    type=click.Choice(["raw", "data"]),
    default="raw",
    show_default=True,
    help="Eigenpairs of Γ itself, or of Σ^½ Γ Σ^½: shares are then of variance.",
)
@click.option("--text", default="python", show_default=True, help="python, samples, hub:NAME, or a text file.")
@click.option("--tokens", type=terminal.COUNT, default=4096, show_default=True, help="Tokens of it.")
@click.option("--window", type=terminal.count(2), default=256, show_default=True, help="Tokens a window.")
@click.option(
    "--fit", type=click.IntRange(2, 9), help="Fit the block now at this degree, where it is not a polynomial."
)
@click.option("--revision", help="Hub revision of TWIN.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--folder", help="Folder for explanation.html, explanation.json and spectrum.png.")
@click.option("--json", "as_json", is_flag=True, help="Print the explanation as JSON.")
def explain(twin: str, direction: str | None, folder: str | None, as_json: bool, **given: Any) -> None:
    """Read one block of TWIN: which inputs make it write a direction, by the eigenvectors of its quadratic part."""
    from surgery.reading.explanation import explain as run
    from surgery.reading.page import files_of, lines

    found = run(twin, output=direction, folder=folder, quiet=as_json, **given)
    for line in [json.dumps(found, indent=2)] if as_json else lines(found):
        terminal.echo(line)
    if folder and not as_json:
        terminal.echo(f"{folder}: {', '.join(files_of(found))}")


@click.command()
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--revisions", help="Hub revisions of one model, separated by commas, instead of several checkpoints.")
@click.option("--degrees", default="1,2", show_default=True, help="Degrees to try, separated by commas.")
@click.option("--text", default="python", show_default=True, help="python, hub:NAME, or a .txt or .jsonl file.")
@click.option("--tokens", type=terminal.COUNT, default=4096, show_default=True, help="Half to fit, half to score.")
@click.option("--window", type=terminal.count(2), default=256, show_default=True, help="Tokens a window.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", help="Folder for trace.json and trace.png; finished checkpoints are kept there.")
@click.option("--restart", is_flag=True, help="Measure every checkpoint anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the trace as JSON; no progress bar.")
def trace(checkpoints: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Measure how well polynomials fit every block of CHECKPOINTS, through training."""
    from surgery.reading.trace import lines
    from surgery.reading.trace import trace as run

    found = run(checkpoints, quiet=as_json, **given)
    for line in [json.dumps(found, indent=2)] if as_json else lines(found):
        terminal.echo(line)
