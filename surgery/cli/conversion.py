"""`surgery inspect` and `surgery convert`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from surgery.cli import terminal
from surgery.errors import SurgeryError


@click.command()
@click.argument("model")
@click.option("--revision", help="Hub revision.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: str, revision: str | None, as_json: bool) -> None:
    """Show MODEL's feed-forward blocks, and what can be done with each. Reads no weights.

    MODEL is a Hub id, a folder, or a .gguf file.
    """
    from surgery.conversion.inspection import inspect as look

    seen = look(model, revision=revision)
    if as_json:
        terminal.echo(json.dumps(seen.as_dict(), indent=2))
    else:
        terminal.print_blocks(seen)


@click.command()
@click.argument("model", required=False)
@click.option("-o", "--output", help="Folder for the twin.")
@click.option("--recipe", "recipe_file", help="YAML recipe; the options below override it.")
@click.option("--degree", type=terminal.COUNT, help="Total degree of each block's polynomial.  [default: 2]")
@click.option("--assume", help="data, gaussian or standard: distribution the optimum is taken under.  [default: data]")
@click.option("--moments", help="Safetensors file with PATH.mean, PATH.covariance (--assume gaussian).")
@click.option("--readout", help="refit or keep the last map of each block.  [default: refit; keep for gaussian]")
@click.option("--target", help="stream or block: what a refitted block aims at.  [default: stream]")
@click.option("--blocks", help="Which blocks, as in 0-5,8.  [default: all]")
@click.option("--budget", type=float, help="Nats that may be lost; picks degree 2, 3 or the original per block.")
@click.option("--units", type=float, help="Share of each block's units to keep, the most useful ones.  [default: 1]")
@click.option(
    "--calibration",
    multiple=True,
    help="broad, samples, python, code, hub:NAME, or a .txt, .jsonl or .safetensors file; repeatable, with shares as "
    "in novels.txt=2.  [default: broad, fetched from the Hub; samples where it cannot be]",
)
@click.option("--tokens", type=terminal.COUNT, help="Calibration tokens, as in 200k or 1M.  [default: 65536]")
@click.option("--length", type=terminal.COUNT, help="Tokens a sequence.  [default: 512]")
@click.option(
    "--short", type=float, help="Share of the tokens in short sequences.  [default: 0.5 of samples, 0.1 of texts]"
)
@click.option("--random-tokens", type=float, help="Share of the tokens replaced by random ones.  [default: 0.02]")
@click.option("--batch", type=terminal.COUNT, help="Sequences a forward pass.  [default: 8]")
@click.option(
    "--measure", type=terminal.COUNT, help="Unseen tokens to measure perplexity on; 0: none.  [default: 8192]"
)
@click.option("--seed", type=int, help="Seed for the model's own samples.  [default: 0]")
@click.option("--form", help="auto, native or custom: checkpoint form.  [default: auto]")
@click.option("--dtype", help="Precision to compute in.  [default: float32]")
@click.option("--device", help="cpu, cuda, …; auto: the accelerator, if there is one.  [default: cpu]")
@click.option("--save-dtype", help="Precision of the saved weights.  [default: as in the source]")
@click.option(
    "--tail-weight",
    type=float,
    help="Weight of a wide Gaussian that tames high powers.  [default: 0.01 from degree 4 on]",
)
@click.option("--tail-width", type=float, help="Its width in standard deviations.  [default: 3]")
@click.option("--offload", is_flag=True, default=None, help="Leave weights on disk: for models larger than memory.")
@click.option("--revision", help="Hub revision of MODEL.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier twin at the output.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run has finished.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; load no weights, write nothing.")
@click.option("--nproc", type=terminal.count(1), default=1, show_default=True, help="Processes that share the batches.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON; no progress bar.")
def convert(
    recipe_file: str | None, overwrite: bool, restart: bool, dry_run: bool, nproc: int, as_json: bool, **given: Any
) -> None:
    """Replace MODEL's feed-forward blocks by their least-squares optimal polynomials.

    Works under `accelerate launch -m surgery convert …` too: every process runs its share of the calibration batches.
    """
    from surgery.conversion.recipe import load_recipe
    from surgery.conversion.selection import check_conversion

    sources = given.pop("calibration")
    given["calibration"] = sources[0] if len(sources) == 1 else list(sources) or None
    recipe = load_recipe(recipe_file, given)
    if dry_run:
        from surgery.conversion.inspection import plan_conversion

        planned = plan_conversion(recipe, overwrite)
        terminal.echo(json.dumps(planned, indent=2) if as_json else terminal.plan_text(planned))
        return
    check_conversion(recipe)
    if not recipe.output:
        raise SurgeryError("no output folder was named", fix="give -o OUT, or --dry-run to see the plan")
    from surgery.conversion.pipeline import convert as run
    from surgery.runtime import processes
    from surgery.runtime.launch import relaunch, started

    if nproc > 1 and not started():
        sys.exit(relaunch(nproc, sys.argv[1:]))
    processes.join()
    if processes.first() and not as_json:
        terminal.echo(f"calibration: {terminal.source_name(recipe.calibration)}, {recipe.tokens} tokens", err=True)
    _, report = run(recipe.model, recipe=recipe, overwrite=overwrite, restart=restart, quiet=as_json)
    if not processes.first():
        return
    if as_json:
        terminal.echo(json.dumps(report.as_dict(), indent=2))
    else:
        terminal.print_report(report, recipe.output)
