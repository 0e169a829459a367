"""`surgery card`, `surgery export` and `surgery push`."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli import terminal


@click.command()
@click.argument("twin")
@click.option("--base-model", help="Hub id of the original, where the twin does not know it.")
@click.option("--license", "licence", help="The original's licence.  [default: as on the Hub]")
def card(twin: str, base_model: str | None, licence: str | None) -> None:
    """Write TWIN's model card, README.md, from its saved reports."""
    from surgery.publishing.card import card as run

    made = run(twin, base_model=base_model, licence=licence)
    terminal.echo(f"{twin}/README.md")
    for item in made.missing:
        terminal.echo(f"missing: {item}")


@click.command()
@click.argument("twin")
@click.option("-o", "--output", required=True, help="Folder for the export.")
@click.option("--form", type=click.Choice(["silu", "onnx", "delta", "full"]), default="silu", show_default=True)
@click.option("--base", help="The original, for delta and full: Hub id, folder or .gguf.  [default: as recorded]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier twin at the output.")
def export(twin: str, output: str, **given: Any) -> None:
    """Write TWIN in another form.

    \b
    silu   an ordinary SwiGLU network of twice the width, for engines that know only SiLU (native twins)
    onnx   a graph for onnxruntime and what else reads ONNX, compared there
    delta  only what the twin adds to its original: a few numbers per unit where the readout was kept
    full   the whole twin again, from a delta
    """
    from surgery.publishing.export import export as run

    terminal.echo(f"{output}: {terminal.export_line(run(twin, output, **given))}")


@click.command()
@click.argument("twin")
@click.argument("repository")
@click.option("--private", is_flag=True, help="Create the repository as private.")
@click.option("--revision", help="Branch to push to.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--base-model", help="Hub id of the original, where the twin does not know it.")
@click.option("--license", "licence", help="The original's licence.  [default: as on the Hub]")
@click.option("--dry-run", is_flag=True, help="Show the files, their sizes and the card; touch nothing.")
def push(twin: str, repository: str, dry_run: bool, base_model: str | None, licence: str | None, **how: Any) -> None:
    """Publish TWIN on the Hub as REPOSITORY (user/name), with its card.

    Uses the login of `hf auth login`. An interrupted upload goes on where it stopped.
    """
    from surgery.publishing.hub import plan_push, upload

    planned = plan_push(twin, repository, base_model=base_model, licence=licence)
    for item in planned.card.missing:
        terminal.echo(f"missing from the card: {item}", err=True)
    if dry_run:
        for name, size in planned.files:
            terminal.echo(f"{size:>14,}  {name}")
        terminal.echo(f"\n{planned.card.text}")
        return
    terminal.echo(upload(planned, **how))
