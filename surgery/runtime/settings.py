"""Dataclasses of settings, made from names and values that a user gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from numbers import Integral
from typing import Any, TypeVar

from surgery.errors import RecipeError, did_you_mean

Settings = TypeVar("Settings")


def at_least(least: int, default: Any = MISSING) -> Any:
    """A field whose value is a whole number from `least` on, or None where None is its default."""
    return field(default=default, metadata={"least": least})


def checked_settings(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """An instance of a dataclass of settings.

    Raises:
        RecipeError: names that it does not have, or that lack; numbers below those of :func:`at_least`.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    said = [f"no setting {name!r}{did_you_mean(name, known)}" for name in values if name not in known]
    for name, one in known.items():
        if name in values:
            said += _too_little(one, values[name])
        elif one.default is MISSING is one.default_factory:
            said.append(f"{name} is not given")
    if said:
        raise RecipeError("; ".join(said))
    return kind(**values)


def _too_little(one: Field[Any], value: Any) -> list[str]:
    least = one.metadata.get("least")
    if least is None or (value is None and one.default is None):
        return []
    if isinstance(value, bool) or not isinstance(value, Integral):
        return [f"{one.name} is {value!r}, but must be a whole number"]
    return [f"{one.name} is {value}, but must be at least {least}"] if value < least else []
