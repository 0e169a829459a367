"""The group of all commands, and what each kind of error ends with."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import click

from surgery.cli import conversion, evaluation, publishing, reading, refining, terminal
from surgery.errors import EXIT_USER, SurgeryError
from surgery.runtime.files import CAUSES, not_written
from surgery.runtime.trust import trust
from surgery.version import __version__

EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 130, 143


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="surgery")
def cli() -> None:
    """Turn a pretrained transformer into its polynomial twin."""


for command in (
    conversion.inspect,
    conversion.convert,
    evaluation.evaluate,
    refining.refine,
    reading.explain,
    reading.trace,
    publishing.card,
    publishing.export,
    publishing.push,
):
    cli.add_command(command)
    if command not in (publishing.card, publishing.push):
        command.params.append(
            click.Option(
                ["--trust-remote-code"],
                is_flag=True,
                expose_value=False,
                callback=lambda _context, _option, value: trust(value),
                help="Run code that a checkpoint brings for its tokenizer.",
            )
        )


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
    signal.signal(signal.SIGTERM, _terminated)
    try:
        cli.main(standalone_mode=False)
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
