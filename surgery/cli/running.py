"""`surgery run`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from surgery.cli import options, terminal


@click.command(cls=options.Command, short_help="Do all that a recipe says.")
@click.argument("recipe")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change the recipe, as in convert.degree=3.")
@options.output("Folder for the run.  [default: as the recipe says]")
@options.restart()
@options.nproc()
@options.dry_run()
@options.as_json()
def run(recipe: str, dry_run: bool, as_json: bool, restart: bool, nproc: int | None, **given: Any) -> None:
    """Do all that RECIPE says: convert, refine, measure, write the card, publish; then write a one-page report.

    RECIPE is a YAML file; recipes/ has some. What is finished is not done again: the same command goes on after a kill.
    """
    from surgery.runs.page import result_columns, result_rows
    from surgery.runs.run import plan_run
    from surgery.runs.run import run as do
    from surgery.runtime import processes
    from surgery.runtime.launch import relaunch, started

    if dry_run:
        planned = plan_run(recipe, restart=restart, **given)
        terminal.echo(json.dumps(planned, indent=2)) if as_json else terminal.print_run_plan(planned)
        return
    if nproc is not None and nproc > 1 and not started():
        sys.exit(relaunch(nproc, sys.argv[1:]))
    done = do(recipe, restart=restart, quiet=as_json, **given)
    if not processes.first():
        return
    if as_json:
        pages = [str(page) for page in done.pages]
        told = {**done.record, "folder": str(done.folder), "twin": str(done.twin), "pages": pages}
        terminal.echo(json.dumps(told, indent=2))
        return
    terminal.print_table(done.record["model"], list(result_columns()), [list(row) for row in result_rows(done.twins)])
    for page in done.pages:
        terminal.echo(str(page))
    terminal.echo(f"next:\n{done.next}")
