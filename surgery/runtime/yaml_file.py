"""YAML as a user means it, with the line of every key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import RecipeError, first_line


class _Loader(yaml.SafeLoader):
    """The safe loader, for which 2e-4 is a number as well."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parsed(text: str) -> Any:
    """The value that a piece of YAML stands for. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def read_mapping(path: Path, what: str = "the recipe") -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML file that holds a mapping: its values, and the line of each key, inner ones as `outer.inner`.

    Raises:
        RecipeError: a file that cannot be read, is not valid YAML or no mapping, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        values = parsed(text)
    except OSError as error:
        raise RecipeError(
            f"{what} cannot be read", where=str(path), cause=str(error.strerror), fix="check the path"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{path}{line}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid YAML: {first_line(error)}", where=str(path)) from error
    if values is None:
        return {}, {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{what} is not a mapping of names to values", where=str(path))
    return values, _lines(node, "", path)


def _lines(node: yaml.MappingNode, before: str, path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{before}{key.value}", key.start_mark.line + 1
        if name in found:
            raise RecipeError(f"{name} is given twice", where=f"{path}:{line}")
        found[name] = line
        if isinstance(value, yaml.MappingNode):
            found |= _lines(value, f"{name}.", path)
    return found
