"""`surgery refine`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from surgery.cli import options, terminal


@click.command(cls=options.Command, short_help="Distil a twin briefly from its original.")
@click.argument("twin")
@options.original()
@options.output("Folder for the refined twin.", required=True)
@options.text(
    "Text to train on.", "broad, fetched from the Hub; python=2, code=2 and samples where that fails", several=True
)
@options.tokens("Tokens to train on", "1M")
@options.window(256)
@click.option("--short", type=float, help="Share of the tokens in sentences by themselves.  [default: 0.1]")
@options.batch(4)
@click.option("--accumulate", type=options.COUNT, help="Forward passes in one step.  [default: 1]")
@click.option("--train", metavar="NAME", help="coefficients, readout, block, all or lora.  [default: block]")
@click.option("--lora-rank", type=options.COUNT, help="Rank of LoRA.  [default: 16]")
@click.option("--lora-modules", metavar="LIST", help="Modules LoRA goes on, with commas.  [default: all-linear]")
@click.option("--objective", metavar="NAME", help="kl: end to end; local: every block by itself.  [default: kl]")
@click.option("--match", type=float, help="Weight of the blocks' own errors beside KL.  [default: 0]")
@click.option("--blend", type=float, help="Share of the steps in which original blocks fade out.  [default: 0]")
@click.option("--rate", type=float, help="Peak learning rate.  [default: 1e-4]")
@click.option("--warmup", type=float, help="Share of the steps to reach it.  [default: 0.05]")
@click.option("--clip", type=float, help="Bound on the gradient's norm.  [default: 1]")
@click.option("--anchor", type=float, help="Pull towards the weights it started from (a norm penalty).  [default: 0]")
@click.option("--average", type=float, help="Decay of the weights' running mean; 0: none.  [default: 0.98]")
@click.option("--temperature", type=float, help="Temperature of the distillation loss.  [default: 1]")
@options.dtype("auto")
@options.device()
@click.option("--checkpointing", is_flag=True, default=None, help="Less memory for activations, a third more time.")
@click.option("--shard", is_flag=True, default=None, help="Share every tensor out between the processes (FSDP2).")
@click.option("--validate-tokens", type=options.COUNT, help="Held-out tokens.  [default: 8192]")
@click.option("--validate-every", type=options.COUNT, help="Steps between two looks at them.  [default: 100]")
@click.option("--patience", type=options.COUNT, help="Looks without improvement to stop after; 0: never.  [default: 0]")
@click.option(
    "--teacher-top-k",
    type=options.COUNT,
    help="Words of the original's predictions to keep on disk for windows that come again; 0: none.  [default: 0]",
)
@click.option("--control", is_flag=True, default=None, help="Train the original alike, on the text itself.")
@click.option("--report-to", multiple=True, metavar="NAME", help="Tracker, as tensorboard or wandb. Repeatable.")
@options.seed("the order of the windows")
@options.original_revision()
@options.nproc()
@options.overwrite()
@options.restart()
@options.dry_run()
@options.as_json()
def refine(nproc: int | None, overwrite: bool, restart: bool, dry_run: bool, as_json: bool, **settings: Any) -> None:
    """Distil TWIN briefly from its original. Also runs under `accelerate launch -m surgery refine …`.

    An interrupted run goes on exactly where it stopped. The best state on held-out text is what is saved.
    """
    from surgery.refining.run import plan_refinement
    from surgery.refining.run import refine as run
    from surgery.runtime import processes
    from surgery.runtime.launch import relaunch, started

    said = options.given(settings)
    if dry_run:
        planned = plan_refinement(**said, processes=nproc or int(os.environ.get("WORLD_SIZE", "1")))
        terminal.echo(json.dumps(planned, indent=2) if as_json else terminal.refinement_plan(planned))
        return
    if nproc is not None and nproc > 1 and not started():
        sys.exit(relaunch(nproc, sys.argv[1:]))
    record = run(**said, overwrite=overwrite, restart=restart, quiet=as_json)
    if not processes.first():
        return
    if as_json:
        terminal.echo(json.dumps(record, indent=2))
        return
    for line in terminal.refinement_lines(record):
        terminal.echo(line)
    for line in terminal.refinement_warnings(record):
        terminal.echo(line, err=True)
    terminal.echo(f"{settings['output']}: reloaded in a fresh process and compared")
