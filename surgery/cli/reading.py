"""`surgery explain` and `surgery trace`."""

from __future__ import annotations

import json
from typing import Any

import click

from surgery.cli import options, terminal


@click.command(cls=options.Command, short_help="Read one block of a twin.")
@click.argument("twin")
@click.option("--block", type=options.COUNT, required=True, help="Its number, as `surgery inspect` counts.")
@click.option("--expert", type=options.COUNT, help="Which expert of it, where the block is a mixture.")
@click.option(
    "--direction",
    help="Direction of the block's output: token:TEXT, neuron:BLOCK.UNIT, coordinate:I, class:I, file:PATH, linear:K, "
    "quadratic:K or feature:I.  [default: list the block's own]",
)
@click.option("--minus", help="A direction to subtract, as in the difference of two logits.")
@click.option("--pairs", type=options.COUNT, help="Eigenpairs to show.  [default: 6]")
@click.option(
    "--coordinates",
    metavar="NAME",
    help="raw: eigenpairs of Γ itself; data: of Σ^½ Γ Σ^½, with shares of variance.  [default: raw]",
)
@click.option("--features", metavar="PATH", help="Sparse dictionary (SAE) of the block's input, to read it in.")
@click.option("--output-features", metavar="PATH", help="One of its output (SAE or transcoder), for feature:I.")
@click.option(
    "--features-at",
    metavar="NAME",
    help="What the first describes: input of the block, or stream before its norm.  [default: auto]",
)
@click.option(
    "--upstream",
    metavar="BLOCK=PATH",
    help="An earlier block and a dictionary of its output: which of its features write into what is read.",
)
@click.option("--terms", type=options.COUNT, help="Features and pairs of features to show.  [default: 12]")
@click.option("--rank", metavar="NAME", help="Strongest by text, or by weights alone.  [default: text]")
@options.text("Text that drives the block.", "python")
@options.tokens("Tokens of it", "4096")
@options.window(256)
@click.option("--fit", type=options.COUNT, help="Fit the block now at this degree, where it is not a polynomial.")
@options.revision("TWIN")
@options.seed("samples and fits")
@options.device()
@options.output("Folder for explanation.html, explanation.json and spectrum.png.")
@options.as_json()
def explain(output: str | None, as_json: bool, **settings: Any) -> None:
    """Read one block of TWIN: which inputs make it write a direction, by the eigenvectors of its quadratic part."""
    from surgery.reading.explanation import explain as run
    from surgery.reading.page import files_of, lines

    found = run(**options.given(settings), output=output, quiet=as_json)
    for line in [json.dumps(found, indent=2)] if as_json else lines(found):
        terminal.echo(line)
    if output and not as_json:
        terminal.echo(f"{output}: {', '.join(files_of(found))}")


@click.command(cls=options.Command, short_help="Follow blocks through training.")
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--revisions", help="Hub revisions of one model, separated by commas, instead of several checkpoints.")
@click.option("--degrees", help="Degrees to try, separated by commas.  [default: 1,2]")
@options.text("Text that drives the blocks.", "python")
@options.tokens("Tokens: half to fit, half to score", "4096")
@options.window(256)
@options.seed("samples and fits")
@options.device()
@options.output("Folder for trace.json and trace.png; finished checkpoints are kept there.")
@options.restart()
@options.as_json()
def trace(as_json: bool, **settings: Any) -> None:
    """Measure how well polynomials fit every block of CHECKPOINTS, through training."""
    from surgery.reading.trace import lines
    from surgery.reading.trace import trace as run

    found = run(**options.given(settings), quiet=as_json)
    for line in [json.dumps(found, indent=2)] if as_json else lines(found):
        terminal.echo(line)
