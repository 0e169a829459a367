"""Dataclasses of settings, made from names and values that a user gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from numbers import Integral
from typing import Any, TypeVar, get_type_hints

from surgery.errors import RecipeError, did_you_mean

Settings = TypeVar("Settings")


UNITS = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def whole_number(given: Any) -> int | None:
    """51200, "51200", "200k" or "4M" as a number; None for what is no whole one."""
    text = str(given).strip()
    unit = UNITS.get(text[-1:].lower(), 1)
    try:
        number = float(text if unit == 1 else text[:-1]) * unit
        return round(number) if number == round(number) and not isinstance(given, bool) else None
    except (ValueError, OverflowError):
        return None


def at_least(least: int, default: Any = MISSING) -> Any:
    """A field whose value is a whole number from `least` on, or None where None is its default."""
    return field(default=default, metadata={"least": least})


def checked_settings(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """An instance of a dataclass of settings.

    Raises:
        RecipeError: names that it does not have, or that lack; numbers below those of :func:`at_least`.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    values = {name: _counted(known.get(name), value) for name, value in values.items()}
    said = [f"no setting {name!r}{did_you_mean(name, known)}" for name in values if name not in known]
    hints = get_type_hints(kind)
    for name, one in known.items():
        if name in values:
            said += _too_little(one, values[name]) or _of_another_type(name, hints[name], values[name])
        elif one.default is MISSING is one.default_factory:
            said.append(f"{name} is not given")
    if said:
        raise RecipeError("; ".join(said))
    return kind(**values)


def _counted(one: Field[Any] | None, value: Any) -> Any:
    """A number written as text, where a whole number is wanted."""
    if one is None or one.type not in ("int", "int | None") or not isinstance(value, str):
        return value
    number = whole_number(value)
    return value if number is None else number


def _of_another_type(name: str, hint: Any, value: Any) -> list[str]:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    plain = is_dataclass(hint)  # checked when it was made
    try:
        if not plain:
            TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        text = error.errors()[0]["msg"]
        return [f"{name} is {value!r}, which will not do: {text[:1].lower() + text[1:]}"]
    return []


def _too_little(one: Field[Any], value: Any) -> list[str]:
    least = one.metadata.get("least")
    if least is None or (value is None and one.default is None):
        return []
    if isinstance(value, bool) or not isinstance(value, Integral):
        return [f"{one.name} is {value!r}, but must be a whole number"]
    return [f"{one.name} is {value}, but must be at least {least}"] if value < least else []
