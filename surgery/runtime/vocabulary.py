"""One name for one thing, in every command, recipe and function; names of earlier versions are understood."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from surgery.errors import RecipeError

Function = TypeVar("Function", bound=Callable[..., Any])


class RenamedWarning(FutureWarning):
    """A setting has another name now; the command line prints it as a note."""


FORMER = {
    "calibration": "text",
    "length": "window",
    "teacher": "original",
    "teacher_revision": "original_revision",
    "against": "original",
    "base": "original",
    "precision": "dtype",
    "max_length": "task_window",
    "fewshot": "num_fewshot",
    "licence": "license",
    "folder": "output",
}
"""What settings and options were called before, and what they are called now."""


def as_option(name: str) -> str:
    """`original_revision` as it is typed: `--original-revision`."""
    return f"--{name.replace('_', '-')}"


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under today's names, with a warning for each that had another.

    Raises:
        RecipeError: a value is given under both of its names.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        now = FORMER.get(name, name)
        if now in found or (now != name and now in values):
            raise RecipeError(f"{name} and {now} are the same setting", fix=f"give {now} alone")
        if now != name:
            warnings.warn(f"{name} is called {now} now", RenamedWarning, stacklevel=3)
        found[now] = value
    return found


def understands_former_names(function: Function) -> Function:
    """Lets a function be called with keywords of earlier versions."""

    @functools.wraps(function)
    def called(*args: Any, **given: Any) -> Any:
        return function(*args, **current(given))

    return called  # type: ignore[return-value]
