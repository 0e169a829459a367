"""`surgery refine`."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from surgery.cli import terminal


@click.command()
@click.argument("twin")
@click.option("--teacher", required=True, help="The original: Hub id, folder or .gguf.")
@click.option("-o", "--output", required=True, help="Folder for the refined twin.")
@click.option(
    "--text",
    multiple=True,
    help="broad, samples, python, code, hub:NAME or a text file; repeatable, with shares as in novels.txt=2.  "
    "[default: broad, fetched from the Hub; python=2, code=2 and samples where it cannot be]",
)
@click.option("--tokens", type=terminal.COUNT, help="Tokens to train on, as in 200k or 4M.  [default: 1M]")
@click.option("--length", type=terminal.COUNT, help="Tokens a window.  [default: 256]")
@click.option("--batch", type=terminal.COUNT, help="Windows a forward pass and process.  [default: 4]")
@click.option("--accumulate", type=terminal.COUNT, help="Forward passes a step.  [default: 2]")
@click.option("--train", help="coefficients, readout, block, all or lora.  [default: block]")
@click.option("--lora-rank", type=terminal.COUNT, help="Rank of LoRA.  [default: 16]")
@click.option("--lora-modules", help="Modules LoRA goes on, separated by commas.  [default: all-linear]")
@click.option("--objective", help="kl, end to end; or local, every block by itself.  [default: kl]")
@click.option("--match", type=float, help="Weight of the blocks' own errors beside KL.  [default: 0]")
@click.option("--blend", type=float, help="Share of the steps in which original blocks fade out.  [default: 0]")
@click.option("--rate", type=float, help="Peak learning rate.  [default: 2e-4]")
@click.option("--warmup", type=float, help="Share of the steps to reach it.  [default: 0.05]")
@click.option("--clip", type=float, help="Bound on the gradient's norm.  [default: 1]")
@click.option("--anchor", type=float, help="Norm penalty: pull towards the weights it started from.  [default: 0]")
@click.option("--average", type=float, help="Decay of the weights' running mean; 0: none.  [default: 0.98]")
@click.option("--temperature", type=float, help="Of the distillation loss.  [default: 1]")
@click.option("--precision", help="auto, bf16 or float32, of the training passes.  [default: auto]")
@click.option("--checkpointing", is_flag=True, default=None, help="Less memory for activations, a third more time.")
@click.option("--shard", is_flag=True, default=None, help="Share every tensor out between the processes (FSDP2).")
@click.option("--validate-tokens", type=terminal.COUNT, help="Held-out tokens.  [default: 8192]")
@click.option("--validate-every", type=terminal.COUNT, help="Steps between two looks at them.  [default: 50]")
@click.option(
    "--patience", type=terminal.COUNT, help="Looks without improvement to stop after; 0: never.  [default: 0]"
)
@click.option("--control", is_flag=True, default=None, help="Train the original alike, on the text itself.")
@click.option("--report-to", multiple=True, help="Trackers, as tensorboard or wandb; repeatable.")
@click.option("--seed", type=int, help="Order of the windows.  [default: 0]")
@click.option("--teacher-revision", help="Hub revision of the teacher.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier twin at the output.")
@click.option("--restart", is_flag=True, help="Discard the state of an interrupted run.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; load no weights, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON; no progress bar.")
def refine(overwrite: bool, restart: bool, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Distil TWIN briefly from its original. Works under `accelerate launch -m surgery refine …` too.

    An interrupted run goes on exactly where it stopped; the best state on held-out text is what is saved.
    """
    from surgery.refining.run import plan_refinement
    from surgery.refining.run import refine as run
    from surgery.runtime import processes

    settings = {name: value for name, value in given.items() if value not in (None, ())}
    if dry_run:
        planned = plan_refinement(**settings, processes=int(os.environ.get("WORLD_SIZE", "1")))
        terminal.echo(json.dumps(planned, indent=2) if as_json else terminal.refinement_plan(planned))
        return
    record = run(**settings, overwrite=overwrite, restart=restart, quiet=as_json)
    if not processes.first():
        return
    if as_json:
        terminal.echo(json.dumps(record, indent=2))
        return
    for line in terminal.refinement_lines(record):
        terminal.echo(line)
    for line in terminal.refinement_warnings(record):
        terminal.echo(line, err=True)
    terminal.echo(f"{given['output']}: reloaded in a fresh process and compared")
