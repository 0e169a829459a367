"""The group of all commands, and what each kind of error ends with."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import click

from surgery.cli import conversion, evaluation, options, publishing, reading, refining, running, terminal
from surgery.errors import EXIT_USER, RecipeError, SurgeryError, did_you_mean
from surgery.runtime.files import CAUSES, not_written
from surgery.runtime.vocabulary import RenamedWarning
from surgery.version import __version__

EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 130, 143


class _Commands(click.Group):
    """The group of all commands; whoever leaves the verb out is told what to type."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise RecipeError(_no_verb(args[0], did_you_mean(args[0], self.commands)), fix=_next_to_type(args[0]))
        return super().resolve_command(ctx, args)


def _no_verb(word: str, near: str) -> str:
    return f"{word!r} is not a command{near}"


def _next_to_type(word: str) -> str:
    """For a recipe, a twin or a model; else the list of commands."""
    path = Path(word)
    if path.suffix in (".yaml", ".yml"):
        return f"`surgery run {word}`"
    if (path / "surgery.json").is_file():
        return f"`surgery eval {word}` to measure the twin, `surgery --help` for more"
    if path.exists() or "/" in word:
        return f"`surgery convert {word} -o twin` to convert the model, `surgery --help` for more"
    return "`surgery --help` lists the commands"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="surgery")
def cli() -> None:
    """Turn a pretrained transformer into its polynomial twin.

    \b
    surgery convert MODEL -o twin     the twin, and the perplexity it cost
    surgery eval twin                 how faithful it is, as a table, pictures and JSON
    surgery push twin user/name       published on the Hub
    surgery run RECIPE.yaml           all of it, from one file
    """


@click.command(cls=options.Command, short_help="Print a shell completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    Put eval "$(surgery completion bash)" into the shell's start-up file.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "surgery", "_SURGERY_COMPLETE").source())


for command in (
    running.run,
    conversion.inspect,
    conversion.convert,
    evaluation.evaluate,
    refining.refine,
    reading.explain,
    reading.trace,
    publishing.card,
    publishing.export,
    publishing.push,
    completion,
):
    cli.add_command(command)
    if command not in (publishing.card, publishing.push, completion):
        command.params.append(options.trust_remote_code())


def _leave_group() -> None:
    """The group that a command joined under a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from surgery.runtime import processes

        processes.leave()


def _terminated(*_: object) -> None:
    """A terminated process cleans up as an interrupted one does."""
    terminal.echo("terminated; what is finished is kept, run the same command to go on", err=True)
    sys.exit(EXIT_TERMINATED)


def main() -> None:
    """Entry point: errors a user can mend exit with 2 and no traceback; defects exit with 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    if "--json" in sys.argv:
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' own bars as well
    signal.signal(signal.SIGTERM, _terminated)
    shown = warnings.showwarning
    warnings.showwarning = lambda message, category, *where, **more: (
        terminal.echo(f"note: {message}", err=True)
        if issubclass(category, RenamedWarning)
        else shown(message, category, *where, **more)
    )
    try:
        cli.main(prog_name="surgery", standalone_mode=False)
        _leave_group()
    except SurgeryError as error:
        terminal.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USER)
    except click.exceptions.Abort:
        terminal.echo("interrupted; finished blocks are kept, run the same command to go on", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USER)
    except MemoryError:
        terminal.echo("error: out of memory\n  next step: lower --tokens or --batch", err=True)
        sys.exit(EXIT_USER)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CAUSES:
            where = Path(str(error.filename)) if error.filename else Path.cwd()
            terminal.echo(f"error: {not_written(error, 'a file could not be written', where)}", err=True)
            sys.exit(EXIT_USER)
        with tempfile.NamedTemporaryFile("w", prefix="surgery-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        kind = sys.exc_info()[0]
        terminal.echo(
            f"internal error: {kind.__name__ if kind else ''}: {sys.exc_info()[1]}\n"
            f"  next step: report it, with {log.name}",
            err=True,
        )
        sys.exit(EXIT_INTERNAL)
