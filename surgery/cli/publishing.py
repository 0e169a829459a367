"""`surgery card`, `surgery export` and `surgery push`."""

from __future__ import annotations

import json
from typing import Any

import click

from surgery.cli import options, terminal


def _base_model() -> options.Option[Any]:
    return click.option("--base-model", metavar="ID", help="Hub id of the original, where the twin does not know it.")


def _license() -> options.Option[Any]:
    return click.option("--license", metavar="ID", help="The original's licence.  [default: as on the Hub]")


@click.command(cls=options.Command, short_help="Write the model card.")
@click.argument("twin")
@_base_model()
@_license()
@options.as_json()
def card(twin: str, base_model: str | None, license: str | None, as_json: bool) -> None:
    """Write TWIN's model card, README.md, from its saved reports."""
    from surgery.publishing.card import card as run

    made = run(twin, base_model=base_model, license=license)
    if as_json:
        terminal.echo(json.dumps({"card": f"{twin}/README.md", "missing": made.missing}, indent=2))
        return
    terminal.echo(f"{twin}/README.md")
    for item in made.missing:
        terminal.echo(f"missing: {item}")


@click.command(cls=options.Command, short_help="Write a twin in another form.")
@click.argument("twin")
@options.output("Folder for the export.", required=True)
@click.option("--form", metavar="NAME", help="silu, gguf, onnx, encrypted, delta or full.  [default: silu]")
@options.original()
@click.option(
    "--weights", metavar="TYPE", help="Of a GGUF file: f32, bf16, f16, q8_0, q5_1 … q4_0.  [default: as stored]"
)
@options.text("Text that encrypted units' ranges are measured on.", "python")
@options.tokens("Of it to calibrate them on, and as many to test them on", "8k")
@options.overwrite()
@options.as_json()
def export(twin: str, output: str, as_json: bool, **settings: Any) -> None:
    """Write TWIN in another form.

    \b
    silu       an ordinary SwiGLU network of twice the width, for engines that know only SiLU (native twins)
    gguf       the same as a file for llama.cpp, run there where xllamacpp is installed
    onnx       a graph for onnxruntime and other readers of ONNX, compared there
    encrypted  blocks of degree 2 for CKKS: scaled weights, parameters, ranges on unseen text
    delta      only what the twin adds to its original: a few numbers per unit where the readout was kept
    full       the whole twin again, from a delta
    """
    from surgery.publishing.export import export as run

    seen = run(twin, output, quiet=as_json, **options.given(settings))
    terminal.echo(json.dumps(seen, indent=2) if as_json else f"{output}: {terminal.export_line(seen)}")


@click.command(cls=options.Command, short_help="Publish a twin on the Hub.")
@click.argument("twin")
@click.argument("repository")
@click.option("--private", is_flag=True, help="Create the repository as private.")
@click.option("--revision", metavar="NAME", help="Branch to push to.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@_base_model()
@_license()
@options.dry_run()
@options.as_json()
def push(
    twin: str,
    repository: str,
    dry_run: bool,
    as_json: bool,
    base_model: str | None,
    license: str | None,
    **how: Any,
) -> None:
    """Publish TWIN on the Hub as REPOSITORY (user/name), with its card.

    Uses the login of `hf auth login`. An interrupted upload goes on where it stopped.
    """
    from surgery.publishing.hub import plan_push, upload

    planned = plan_push(twin, repository, base_model=base_model, license=license)
    about: dict[str, Any] = {"repository": repository, "files": dict(planned.files), "missing": planned.card.missing}
    if not as_json:
        for item in planned.card.missing:
            terminal.echo(f"missing from the card: {item}", err=True)
    if dry_run and not as_json:
        for name, size in planned.files:
            terminal.echo(f"{size:>14,}  {name}")
        terminal.echo(f"\n{planned.card.text}")
        return
    if not dry_run:
        about["address"] = upload(planned, **how)
    terminal.echo(json.dumps(about, indent=2) if as_json else about["address"])
