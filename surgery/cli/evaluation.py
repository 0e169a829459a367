"""`surgery eval`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from surgery.cli import options, terminal


@click.command("eval", cls=options.Command, short_help="Measure a twin against its original.")
@click.argument("twin")
@options.original()
@options.output("Folder for evaluation.json, summary.md, report.html and pictures.")
@options.text("Text to measure on.", "python")
@options.tokens("Tokens of it to predict", "16384")
@click.option("--skip", type=options.COUNT, help="Tokens of it to pass over.  [default: those the fit saw]")
@options.window(512)
@click.option("--stride", type=options.COUNT, help="Tokens between two windows.  [default: the window]")
@options.batch(4)
@click.option(
    "--kind",
    multiple=True,
    metavar="KIND=SOURCE",
    help="A further kind of text to compare on, as in novel=alice.txt; also dialogue=chat:FILE, sentences=lines:FILE. "
    "Repeat it for several.",
)
@click.option("--kind-tokens", type=options.COUNT, help="Tokens of every kind.  [default: 4096]")
@click.option(
    "--seen", multiple=True, metavar="KIND", help="A kind to count as seen, where the names of the texts do not tell."
)
@click.option("--block-tokens", type=options.COUNT, help="Tokens for R² of the blocks; 0: none.  [default: 4096]")
@click.option("--tasks", metavar="LIST", help="lm-eval tasks, separated by commas; wildcards work.")
@click.option("--include-path", multiple=True, metavar="FOLDER", help="Task files of your own. Repeat it for several.")
@click.option("--num-fewshot", type=options.COUNT, help="Examples before each question.  [default: the task's own]")
@click.option(
    "--apply-chat-template",
    is_flag=False,
    flag_value=True,
    default=None,
    help="Put the questions into the chat template, or into the one of this name.",
)
@click.option("--system-instruction", help="System message before each question.")
@click.option("--limit", type=float, help="Documents in each task: a number, or a share below 1.")
@click.option("--task-batch", type=options.COUNT, help="Requests in one forward pass.  [default: 8]")
@click.option("--task-window", type=options.COUNT, help="Tokens in one request at most.  [default: 2048]")
@click.option("--speed/--no-speed", default=None, help="Measure speed and size.  [default: --speed]")
@options.seed("the bootstrap intervals and the tasks")
@options.dtype("float32")
@options.device()
@click.option("--device-map", metavar="NAME", help="auto: spread over several devices; disk: weights stay on disk.")
@options.revision("TWIN")
@options.original_revision()
@click.option(
    "--cache", metavar="FOLDER", help="Where finished measurements are kept.  [default: ~/.cache/polysurgery]"
)
@click.option("--no-cache", is_flag=True, help="Measure everything anew, keep nothing.")
@options.nproc()
@options.dry_run()
@options.as_json()
def evaluate(
    twin: str, nproc: int | None, dry_run: bool, as_json: bool, cache: str | None, no_cache: bool, **settings: Any
) -> None:
    """Measure TWIN against its original: perplexity, fidelity, blocks, kinds of text, lm-eval tasks, speed.

    An interrupted run goes on: finished pieces are kept by the fingerprints of models, data and settings.
    """
    from evals.evaluation import evaluated
    from evals.memo import default_folder
    from evals.report import files_of, markdown
    from evals.settings import plan_evaluation
    from surgery.models.loading import placed
    from surgery.runtime.freed_memory import keep_freed_memory
    from surgery.runtime.launch import relaunch, started

    planned = plan_evaluation(twin, **options.given(settings))
    if dry_run:
        terminal.echo(terminal.evaluation_plan(planned, nproc or 1))
        return
    if nproc is not None and nproc > 1 and not started():
        sys.exit(relaunch(nproc, sys.argv[1:]))
    if planned.device_map is None and placed(planned.device).type == "cpu":
        keep_freed_memory()
    found = evaluated(planned, settings["output"], None if no_cache else cache or default_folder(), quiet=as_json)
    if found is None:
        return
    if as_json:
        terminal.echo(json.dumps(found, indent=2))
        return
    terminal.echo(markdown(found).rstrip())
    if settings["output"]:
        terminal.echo(f"{settings['output']}: {', '.join(files_of(found))}")
