"""`surgery eval`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from surgery.cli import terminal


@click.command("eval")
@click.argument("twin")
@click.option("--against", help="The original: Hub id, folder or .gguf.  [default: what the twin was made from]")
@click.option("-o", "--output", help="Folder for evaluation.json, summary.md, report.html and blocks.png.")
@click.option("--text", default="python", show_default=True, help="python, hub:NAME, or a .txt or .jsonl file.")
@click.option("--tokens", type=terminal.COUNT, default=16384, show_default=True, help="Tokens of it to predict.")
@click.option("--skip", type=terminal.COUNT, help="Tokens of it to pass over.  [default: those the fit saw]")
@click.option("--window", type=terminal.count(2), default=512, show_default=True, help="Tokens a window.")
@click.option("--stride", type=terminal.count(1), help="Tokens between two windows.  [default: the window]")
@click.option("--batch", type=terminal.count(1), default=4, show_default=True, help="Windows a forward pass.")
@click.option("--block-tokens", type=terminal.COUNT, default=4096, show_default=True, help="For R² of blocks.")
@click.option("--tasks", default="", help="lm-eval tasks, separated by commas; wildcards work.")
@click.option("--include-path", multiple=True, help="Folder with task files of your own; repeatable.")
@click.option(
    "--num-fewshot",
    "--fewshot",
    "num_fewshot",
    type=terminal.COUNT,
    help="Examples before each question.  [default: the task's own]",
)
@click.option(
    "--apply-chat-template",
    is_flag=False,
    flag_value=True,
    default=False,
    help="Put the questions into the chat template, or into the one of this name.",
)
@click.option("--system-instruction", help="System message before each question.")
@click.option("--limit", type=float, help="Documents a task: a number, or a share below 1.")
@click.option("--task-batch", type=terminal.count(1), default=8, show_default=True, help="Requests a forward pass.")
@click.option("--max-length", type=terminal.count(2), default=2048, show_default=True, help="Tokens a request at most.")
@click.option("--speed/--no-speed", default=True, show_default=True, help="Measure speed and size.")
@click.option("--nproc", type=terminal.count(1), default=1, show_default=True, help="Processes that share documents.")
@click.option("--dtype", default="float32", show_default=True, help="Precision to compute in; auto: the stored one.")
@click.option("--device-map", help="auto: over several devices; disk: larger than memory, weights stay there.")
@click.option("--revision", help="Hub revision of TWIN.")
@click.option("--original-revision", help="Hub revision of the original.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--cache", help="Folder for finished measurements.  [default: ~/.cache/polysurgery/evals]")
@click.option("--no-cache", is_flag=True, help="Measure everything anew, keep nothing.")
@click.option("--dry-run", is_flag=True, help="Check everything that can be without running a model.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON; no progress bar.")
def evaluate(
    twin: str, nproc: int, dry_run: bool, as_json: bool, cache: str | None, no_cache: bool, **given: Any
) -> None:
    """Measure TWIN against its original: perplexity, fidelity, blocks, lm-eval tasks, speed.

    An interrupted run resumes: finished pieces are kept by the fingerprints of models, data and settings.
    """
    from evals.evaluation import evaluated
    from evals.memo import default_folder
    from evals.report import files_of, markdown
    from evals.settings import plan_evaluation
    from surgery.runtime.launch import relaunch, started

    planned = plan_evaluation(twin, **given)
    if dry_run:
        terminal.echo(terminal.evaluation_plan(planned, nproc))
        return
    if nproc > 1 and not started():
        sys.exit(relaunch(nproc, sys.argv[1:]))
    found = evaluated(planned, given["output"], None if no_cache else cache or default_folder(), quiet=as_json)
    if found is None:
        return
    if as_json:
        terminal.echo(json.dumps(found, indent=2))
        return
    terminal.echo(markdown(found).rstrip())
    if given["output"]:
        terminal.echo(f"{given['output']}: {', '.join(files_of(found))}")
