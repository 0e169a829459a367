"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import click

from surgery import __version__, terminal
from surgery.errors import SurgeryError

EXIT_USER, EXIT_INTERNAL, EXIT_INTERRUPTED = 2, 1, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="surgery")
def cli() -> None:
    """Turn a pretrained transformer into its polynomial twin."""


@cli.command()
@click.argument("model")
@click.option("--revision", help="Hub revision.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: str, revision: str | None, as_json: bool) -> None:
    """Show MODEL's feed-forward blocks, and what can be done with each. Reads no weights.

    MODEL is a Hub id, a folder, or a .gguf file.
    """
    from surgery.inspection import inspect as look

    seen = look(model, revision)
    if as_json:
        click.echo(json.dumps(seen.as_dict(), indent=2))
    else:
        terminal.print_blocks(seen)


@cli.command()
@click.argument("model", required=False)
@click.option("-o", "--output", help="Folder for the twin.")
@click.option("--recipe", "recipe_file", help="YAML recipe; the options below override it.")
@click.option("--degree", type=int, help="Total degree of each block's polynomial.  [default: 2]")
@click.option("--assume", help="data, gaussian or standard: distribution the optimum is taken under.  [default: data]")
@click.option("--moments", help="Safetensors file with PATH.mean, PATH.covariance (--assume gaussian).")
@click.option("--readout", help="refit or keep the last map of each block.  [default: refit; keep for gaussian]")
@click.option("--target", help="stream or block: what a refitted block aims at.  [default: stream]")
@click.option("--blocks", help="Which blocks, as in 0-5,8.  [default: all]")
@click.option("--budget", type=float, help="Nats that may be lost; picks degree 2, 3 or the original per block.")
@click.option("--units", type=float, help="Share of each block's units to keep, the most useful ones.  [default: 1]")
@click.option(
    "--calibration",
    help="samples, python, hub:NAME, or a .txt, .jsonl or .safetensors file.  [default: the model's own samples; "
    "python where it cannot generate]",
)
@click.option("--tokens", type=int, help="Calibration tokens.  [default: 65536]")
@click.option("--length", type=int, help="Tokens a sequence.  [default: 512]")
@click.option(
    "--short", type=float, help="Share of the tokens in short sequences.  [default: 0.5 of samples, 0.1 of texts]"
)
@click.option("--random-tokens", type=float, help="Share of the tokens replaced by random ones.  [default: 0.02]")
@click.option("--batch", type=int, help="Sequences a forward pass.  [default: 8]")
@click.option("--measure", type=int, help="Unseen tokens to measure perplexity on; 0: none.  [default: 8192]")
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
@click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the batches.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON; no progress bar.")
def convert(
    recipe_file: str | None, overwrite: bool, restart: bool, dry_run: bool, nproc: int, as_json: bool, **given: Any
) -> None:
    """Replace MODEL's feed-forward blocks by their least-squares optimal polynomials.

    Works under `accelerate launch -m surgery convert …` too: every process runs its share of the calibration batches.
    """
    from surgery.recipe import load_recipe

    recipe = load_recipe(recipe_file, given)
    if not recipe.model:
        raise SurgeryError("no model was named", fix="surgery convert MODEL -o OUT, or name it in the recipe")
    from surgery.texts import check_source

    check_source(recipe.calibration)
    if dry_run:
        from surgery.inspection import plan

        planned = plan(recipe)
        click.echo(json.dumps(planned, indent=2) if as_json else terminal.plan_text(planned))
        return
    if not recipe.output:
        raise SurgeryError("no output folder was named", fix="give -o OUT, or --dry-run to see the plan")
    from evals.processes import Processes, relaunch, started
    from surgery.pipeline import convert as run

    if nproc > 1 and not started():
        raise SystemExit(relaunch(nproc, sys.argv[1:]))
    processes = Processes.join()
    if not as_json and processes.first:
        source = "the model's own samples (python if it cannot generate)" if recipe.calibration == "auto" else ""
        click.echo(f"calibration: {source or recipe.calibration}, {recipe.tokens} tokens", err=True)
    _, report = run(
        recipe.model, recipe=recipe, output=recipe.output, overwrite=overwrite, restart=restart, quiet=as_json
    )
    if processes.first:
        if as_json:
            click.echo(json.dumps(report.as_dict(), indent=2))
        else:
            terminal.print_report(report, recipe.output)
    processes.leave()


@cli.command("eval")
@click.argument("twin")
@click.option("--against", help="The original: Hub id, folder or .gguf.  [default: what the twin was made from]")
@click.option("-o", "--output", help="Folder for evaluation.json, summary.md and report.html.")
@click.option("--text", default="python", show_default=True, help="python, hub:NAME, or a .txt or .jsonl file.")
@click.option("--tokens", type=click.IntRange(2), default=16384, show_default=True, help="Tokens of it to predict.")
@click.option("--skip", type=click.IntRange(0), help="Tokens of it to pass over.  [default: those the fit saw]")
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens a window.")
@click.option("--stride", type=click.IntRange(1), help="Tokens between two windows.  [default: the window]")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Windows a forward pass.")
@click.option("--block-tokens", type=click.IntRange(0), default=4096, show_default=True, help="For R² of blocks.")
@click.option("--tasks", default="", help="lm-eval tasks, separated by commas; wildcards work.")
@click.option("--include-path", multiple=True, help="Folder with task files of your own; repeatable.")
@click.option("--fewshot", type=click.IntRange(0), help="Examples before each question.  [default: the task's own]")
@click.option("--limit", type=float, help="Documents a task: a number, or a share below 1.")
@click.option("--task-batch", type=click.IntRange(1), default=8, show_default=True, help="Requests a forward pass.")
@click.option("--max-length", type=click.IntRange(2), default=2048, show_default=True, help="Tokens a request at most.")
@click.option("--speed/--no-speed", default=True, show_default=True, help="Measure speed and size.")
@click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Processes that share documents.")
@click.option("--dtype", default="float32", show_default=True, help="Precision to compute in; auto: the stored one.")
@click.option("--device-map", help="auto: over several devices; disk: larger than memory, weights stay there.")
@click.option("--revision", help="Hub revision of TWIN.")
@click.option("--original-revision", help="Hub revision of the original.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--cache", help="Folder for finished measurements.  [default: ~/.cache/polysurgery/evals]")
@click.option("--no-cache", is_flag=True, help="Measure everything anew, keep nothing.")
@click.option("--dry-run", is_flag=True, help="Check everything that can be without running a model.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON; no progress bar.")
def evaluate(twin: str, nproc: int, **given: Any) -> None:
    """Measure TWIN against its original: perplexity, fidelity, blocks, lm-eval tasks, speed.

    An interrupted run resumes: finished pieces are kept by the fingerprints of models, data and settings.
    """
    from evals import commands

    found = commands.evaluate(twin, nproc, sys.argv[1:], **given)
    if isinstance(found, int):
        sys.exit(found)
    for line in found:
        click.echo(line)


@cli.command()
@click.argument("twin")
@click.option("--teacher", required=True, help="The original: Hub id, folder or .gguf.")
@click.option("-o", "--output", required=True, help="Folder for the refined twin.")
@click.option("--text", multiple=True, help="python, samples, hub:NAME, a text file; repeatable.  [default: python]")
@click.option("--tokens", type=terminal.COUNT, help="Tokens to train on, as in 200k or 4M.  [default: 1M]")
@click.option("--length", type=int, help="Tokens a window.  [default: 256]")
@click.option("--batch", type=int, help="Windows a forward pass and process.  [default: 4]")
@click.option("--accumulate", type=int, help="Forward passes a step.  [default: 2]")
@click.option("--train", help="coefficients, readout, block, all or lora.  [default: block]")
@click.option("--lora-rank", type=int, help="Rank of LoRA.  [default: 16]")
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
@click.option("--validate-tokens", type=int, help="Held-out tokens.  [default: 8192]")
@click.option("--validate-every", type=int, help="Steps between two looks at them.  [default: 50]")
@click.option("--patience", type=int, help="Stop after so many looks without improvement; 0: never.  [default: 0]")
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
    from surgery import refine as refining
    from surgery.refine_settings import RefineSettings, check

    settings = RefineSettings(**{name: value for name, value in given.items() if value not in (None, ())})
    check(settings)
    if dry_run:
        planned = refining.plan(settings, int(os.environ.get("WORLD_SIZE", "1")))
        click.echo(json.dumps(planned, indent=2) if as_json else terminal.refinement_plan(planned))
        return
    record = refining.refine(settings, overwrite, restart, quiet=as_json)
    if not refining.is_main_process():
        return
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    for line in terminal.refinement_lines(record):
        click.echo(line)
    for line in terminal.refinement_warnings(record):
        click.echo(line, err=True)
    click.echo(f"{settings.output}: reloaded in a fresh process and compared")


@cli.command()
@click.argument("twin")
@click.option("--block", type=click.IntRange(0), required=True, help="Its number, as `surgery inspect` counts.")
@click.option(
    "--output",
    "direction",
    help="Direction of the block's output: token:TEXT, neuron:BLOCK.UNIT, coordinate:I, class:I, file:PATH, linear:K "
    "or quadratic:K.  [default: list the block's own]",
)
@click.option("--minus", help="A direction to subtract, as in the difference of two logits.")
@click.option("--pairs", type=click.IntRange(1), default=6, show_default=True, help="Eigenpairs to show.")
@click.option(
    "--coordinates",
    type=click.Choice(["raw", "data"]),
    default="raw",
    show_default=True,
    help="Eigenpairs of Γ itself, or of Σ^½ Γ Σ^½: shares are then of variance.",
)
@click.option("--text", default="python", show_default=True, help="python, samples, hub:NAME, or a text file.")
@click.option("--tokens", type=click.IntRange(2), default=4096, show_default=True, help="Tokens of it.")
@click.option("--window", type=click.IntRange(2), default=256, show_default=True, help="Tokens a window.")
@click.option(
    "--fit", type=click.IntRange(2, 9), help="Fit the block now at this degree, where it is not a polynomial."
)
@click.option("--revision", help="Hub revision of TWIN.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--folder", help="Folder for explanation.html, explanation.json and spectrum.png.")
@click.option("--json", "as_json", is_flag=True, help="Print the explanation as JSON.")
def explain(twin: str, direction: str | None, folder: str | None, as_json: bool, **given: Any) -> None:
    """Read one block of TWIN: which inputs make it write a direction, by the eigenvectors of its quadratic part."""
    from pathlib import Path

    from surgery.explain import page
    from surgery.explain.explaining import ExplainSettings
    from surgery.explain.explaining import explain as run

    found = run(ExplainSettings(twin, output=direction, **given))
    files = page.write(found, Path(folder)) if folder else []
    for line in [json.dumps(found, indent=2)] if as_json else page.lines(found):
        click.echo(line)
    if files and not as_json:
        click.echo(f"{folder}: {', '.join(files)}")


@cli.command()
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--revisions", help="Hub revisions of one model, separated by commas, instead of several checkpoints.")
@click.option("--degrees", default="1,2", show_default=True, help="Degrees to try, separated by commas.")
@click.option("--text", default="python", show_default=True, help="python, hub:NAME, or a .txt or .jsonl file.")
@click.option("--tokens", type=click.IntRange(2), default=4096, show_default=True, help="Half to fit, half to score.")
@click.option("--window", type=click.IntRange(2), default=256, show_default=True, help="Tokens a window.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", help="Folder for trace.json and trace.png; finished checkpoints are kept there.")
@click.option("--restart", is_flag=True, help="Measure every checkpoint anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the trace as JSON; no progress bar.")
def trace(
    checkpoints: tuple[str, ...], revisions: str | None, output: str | None, restart: bool, as_json: bool, **given: Any
) -> None:
    """Measure how well polynomials fit every block of CHECKPOINTS, through training."""
    from pathlib import Path

    from surgery.explain import trace as tracing

    settings = tracing.settings(**given)
    moments = tracing.checkpoints(checkpoints, revisions)
    found = tracing.trace(moments, settings, Path(output) if output else None, restart, quiet=as_json)
    for line in [json.dumps(found, indent=2)] if as_json else tracing.lines(found):
        click.echo(line)


@cli.command()
@click.argument("twin")
@click.option("--base-model", help="Hub id of the original, where the twin does not know it.")
@click.option("--license", "licence", help="The original's licence.  [default: as on the Hub]")
def card(twin: str, base_model: str | None, licence: str | None) -> None:
    """Write TWIN's model card, README.md, from its saved reports."""
    from pathlib import Path

    from surgery import card as cards

    made = cards.write(Path(twin), base_model, licence)
    click.echo(f"{twin}/README.md")
    for item in made.missing:
        click.echo(f"missing: {item}")


@cli.command()
@click.argument("twin")
@click.option("-o", "--output", required=True, help="Folder for the export.")
@click.option("--form", type=click.Choice(["silu", "onnx", "delta", "full"]), default="silu", show_default=True)
@click.option("--base", help="The original, for delta and full: Hub id, folder or .gguf.  [default: as recorded]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier twin at the output.")
def export(twin: str, output: str, form: str, base: str | None, overwrite: bool) -> None:
    """Write TWIN in another form.

    \b
    silu   an ordinary SwiGLU network of twice the width, for engines that know only SiLU (native twins)
    onnx   a graph for onnxruntime and what else reads ONNX, compared there
    delta  only what the twin adds to its original: a few numbers per unit where the readout was kept
    full   the whole twin again, from a delta
    """
    from pathlib import Path

    from surgery.export import export as run

    click.echo(f"{output}: {run(form, Path(twin), Path(output), base, overwrite)}")


@cli.command()
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
    from pathlib import Path

    from surgery import hub

    planned = hub.plan(Path(twin), repository, base_model, licence)
    for item in planned.card.missing:
        click.echo(f"missing from the card: {item}", err=True)
    if dry_run:
        for name, size in planned.files:
            click.echo(f"{size:>14,}  {name}")
        click.echo(f"\n{planned.card.text}")
        return
    click.echo(hub.push(planned, **how))


def main() -> None:
    """Entry point: errors a user can mend exit with 2 and no traceback; defects exit with 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    try:
        cli.main(standalone_mode=False)
    except SurgeryError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USER)
    except click.exceptions.Abort:
        click.echo("interrupted; finished blocks are kept, run the same command to go on", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USER)
    except MemoryError:
        click.echo("error: out of memory\n  next step: lower --tokens or --batch", err=True)
        sys.exit(EXIT_USER)
    except Exception:
        import tempfile

        with tempfile.NamedTemporaryFile("w", prefix="surgery-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        kind = sys.exc_info()[0]
        click.echo(
            f"internal error: {kind.__name__ if kind else ''}: {sys.exc_info()[1]}\n"
            f"  next step: report it, with {log.name}",
            err=True,
        )
        sys.exit(EXIT_INTERNAL)
