"""`surgery inspect` and `surgery convert`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from surgery.cli import options, terminal
from surgery.errors import SurgeryError


@click.command(cls=options.Command, short_help="List the feed-forward blocks.")
@click.argument("model")
@options.revision("MODEL")
@options.as_json()
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


@click.command(cls=options.Command, short_help="Make the polynomial twin of a model.")
@click.argument("model", required=False)
@options.output("Folder for the twin.")
@click.option(
    "--recipe", "recipe_file", metavar="FILE", help="YAML file with these options by name; flags override it."
)
@click.option("--degree", type=options.COUNT, help="Total degree of each block's polynomial, 1 to 9.  [default: 2]")
@click.option(
    "--assume", metavar="NAME", help="Distribution of the inputs: data, gaussian or standard.  [default: data]"
)
@click.option("--moments", metavar="FILE", help="Safetensors file with PATH.mean, PATH.covariance (--assume gaussian).")
@click.option(
    "--readout", metavar="NAME", help="refit or keep each block's last map.  [default: refit; keep for gaussian]"
)
@click.option("--target", metavar="NAME", help="What a block aims at: stream or block.  [default: stream]")
@click.option("--blocks", metavar="LIST", help="Which blocks, as in 0-5,8.  [default: all]")
@click.option("--budget", type=float, help="Nats that may be lost; picks degree 2, 3 or the original per block.")
@click.option(
    "--epochs",
    type=options.COUNT,
    help="Times each token is seen while all maps of a block are fitted.  [default: 6 at degree 2, else 0]",
)
@click.option("--units", type=float, help="Share of each block's units to keep, the most useful ones.  [default: 1]")
@options.text(
    "Text to calibrate on.", "broad, fetched from the Hub; samples of the model where that fails", several=True
)
@options.tokens("Calibration tokens", "65536")
@options.window(512)
@click.option(
    "--short", type=float, help="Share of the tokens in short windows.  [default: 0.5 of samples, 0.1 of texts]"
)
@click.option("--random-tokens", type=float, help="Share of the tokens replaced by random ones.  [default: 0.02]")
@options.batch(8)
@click.option("--measure", type=options.COUNT, help="Unseen tokens to measure perplexity on; 0: none.  [default: 8192]")
@options.seed("the model's own samples")
@click.option("--form", metavar="NAME", help="Form of the checkpoint: auto, native or custom.  [default: auto]")
@options.dtype("float32")
@click.option(
    "--matmul",
    type=options.MATMUL,
    help="What float32 matrices are multiplied in; auto: bfloat16 where that is faster.  [default: auto]",
)
@options.device()
@click.option(
    "--save-dtype", type=options.DTYPE, help="Precision of the saved weights; auto: as in the source.  [default: auto]"
)
@click.option(
    "--tail-weight",
    type=float,
    help="Weight of a wide Gaussian that tames high powers.  [default: 0.01 from degree 4 on]",
)
@click.option("--tail-width", type=float, help="Its width in standard deviations.  [default: 3]")
@click.option("--offload", is_flag=True, default=None, help="Leave weights on disk: for models larger than memory.")
@options.revision("MODEL")
@options.nproc()
@options.overwrite()
@options.restart()
@options.dry_run()
@options.as_json()
def convert(
    recipe_file: str | None,
    overwrite: bool,
    restart: bool,
    dry_run: bool,
    nproc: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Replace MODEL's feed-forward blocks by their least-squares optimal polynomials.

    MODEL is a Hub id, a folder, or a .gguf file. Also runs under `accelerate launch -m surgery convert …`: every
    process takes its share of the calibration text.
    """
    from surgery.conversion.recipe import load_recipe
    from surgery.conversion.selection import check_conversion

    sources = settings["text"]
    settings["text"] = sources[0] if len(sources) == 1 else list(sources) or None
    recipe = load_recipe(recipe_file, options.given(settings))
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

    if nproc is not None and nproc > 1 and not started():
        sys.exit(relaunch(nproc, sys.argv[1:]))
    processes.join()
    if processes.first() and not as_json:
        terminal.echo(f"text: {terminal.source_name(recipe.text)}, {recipe.tokens:,} tokens", err=True)
    _, report = run(recipe.model, recipe=recipe, overwrite=overwrite, restart=restart, quiet=as_json)
    if not processes.first():
        return
    if as_json:
        terminal.echo(json.dumps(report.as_dict(), indent=2))
    else:
        terminal.print_report(report, recipe.output)
