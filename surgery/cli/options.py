"""The options that commands share: each has one name, one type and one meaning in all of them.

What an option is left at stands in the settings of the room that the command calls; help texts repeat it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from surgery.runtime.settings import whole_number
from surgery.runtime.trust import trust
from surgery.runtime.vocabulary import FORMER, as_option

Function = TypeVar("Function", bound=Callable[..., Any])
Option = Callable[[Function], Function]


class _Count(click.ParamType):  # type: ignore[type-arg]
    """A whole number, of tokens mostly: 51200, 200k or 4M. The settings say what is too little."""

    name = "count"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        number = whole_number(value)
        if number is None:
            self.fail(f"{value!r} is not a whole number: write 51200, 200k or 4M", param, ctx)
        return number


COUNT = _Count()
DTYPE = click.Choice(["auto", "float32", "bfloat16", "float16"])
MATMUL = click.Choice(["auto", "float32", "bfloat16"])


class Command(click.Command):
    """A command that understands the options of earlier versions."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in parameter.opts}
        former = {as_option(old): as_option(new) for old, new in FORMER.items()}
        words = []
        for word in args:
            name, equals, value = word.partition("=")
            now = former.get(name)
            if name in own or now not in own:
                words.append(word)
            else:
                click.echo(f"note: {name} is called {now} now", err=True)
                words.append(now + equals + value)
        return super().parse_args(ctx, words)


def given(values: dict[str, Any]) -> dict[str, Any]:
    """What was said, by name: options left alone are not in it."""
    return {name: value for name, value in values.items() if value is not None and value != ()}


def output(what: str, required: bool = False) -> Option[Any]:
    return click.option("-o", "--output", metavar="FOLDER", required=required, help=what)


def original() -> Option[Any]:
    return click.option(
        "--original", metavar="MODEL", help="The original: Hub id, folder or .gguf file.  [default: as the twin says]"
    )


def original_revision() -> Option[Any]:
    return click.option("--original-revision", metavar="NAME", help="Revision of the original on the Hub.")


def revision(of: str) -> Option[Any]:
    return click.option("--revision", metavar="NAME", help=f"Revision of {of} on the Hub.")


def text(what: str, default: str, several: bool = False) -> Option[Any]:
    sources = "Sources: broad, samples, python, code, hub:NAME, or a text file."
    share = " Repeat it for several, with shares as in novels.txt=2." if several else ""
    return click.option(
        "--text", metavar="SOURCE", multiple=several, help=f"{what} {sources}{share}  [default: {default}]"
    )


def tokens(what: str, default: str) -> Option[Any]:
    return click.option("--tokens", type=COUNT, help=f"{what}, as in 200k or 4M.  [default: {default}]")


def window(default: int) -> Option[Any]:
    return click.option("--window", type=COUNT, help=f"Tokens in one window of text.  [default: {default}]")


def batch(default: int) -> Option[Any]:
    return click.option("--batch", type=COUNT, help=f"Windows in one forward pass.  [default: {default}]")


def seed(of: str) -> Option[Any]:
    return click.option("--seed", type=COUNT, help=f"Seed of {of}.  [default: 0]")


def device() -> Option[Any]:
    return click.option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, …; auto: the accelerator, if there is one.  [default: auto]",
    )


def dtype(default: str) -> Option[Any]:
    return click.option(
        "--dtype",
        type=DTYPE,
        help=f"Precision of the forward passes; auto: bfloat16 where the device is fast at it.  [default: {default}]",
    )


def overwrite() -> Option[Any]:
    return click.option("--overwrite", is_flag=True, help="Replace an earlier result at the output.")


def restart() -> Option[Any]:
    return click.option("--restart", is_flag=True, help="Discard what an interrupted run has finished.")


def dry_run() -> Option[Any]:
    return click.option("--dry-run", is_flag=True, help="Say what would be done. Load no weights, write nothing.")


def nproc() -> Option[Any]:
    return click.option("--nproc", type=click.IntRange(1), help="Processes that share the work.  [default: 1]")


def as_json() -> Option[Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, without progress bars.")


def trust_remote_code() -> click.Option:
    """For every command that reads a model."""
    return click.Option(
        ["--trust-remote-code"],
        is_flag=True,
        expose_value=False,
        callback=lambda _context, _option, value: trust(value),
        help="Run code that a checkpoint brings for its tokenizer.",
    )
