"""What is shown: it names no place on this machine where it leaves it, and nothing in it acts on who shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PLACE = re.compile(r"(?<![\w.:/\\~-])(?:~|/|[A-Za-z]:[/\\])[^\s'\"<>|:;,()\[\]{}&]*[/\\][^\s'\"<>|:;,()\[\]{}&]*")
"""An absolute path of two parts at least, within a sentence; addresses on the network are none."""


def public_text(text: str) -> str:
    """A text with the paths of this machine by their last part only.

    Paths that lead nowhere here stay: they are somebody else's, quoted.
    """
    whole = Path(text.strip()) if "\n" not in text and len(text) < 4096 else None
    if whole is not None and len(whole.parts) > 1 and _is_here(text.strip()):
        return whole.name
    return PLACE.sub(lambda found: Path(found[0]).name if _is_here(found[0]) else found[0], text)


def public(value: Any) -> Any:
    """The same of all strings inside lists, tuples and dictionaries, keys included."""
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, dict):
        return {public(key): public(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(public, value))
    return value


def printable(text: str) -> str:
    """A text with nothing in it that a terminal would obey: control characters are written out, lines stay lines."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def in_markdown(text: str) -> str:
    """A text on one line of Markdown, with no mark-up of its own, in a table as well."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown.replace("`", "'").replace("|", "\\|").replace("<", "&lt;")


def as_label(text: str) -> str:
    """A text as matplotlib draws it letter by letter: what stands between dollars is no formula."""
    return printable(text).replace("$", r"\$")


def _is_here(path: str) -> bool:
    """Whether a path, or the folder it would be in, is on this machine; what lies right in the root is no news."""
    try:
        place = Path(path).expanduser()
        return (place.exists() or place.parent.exists()) and len(place.absolute().parent.parts) > 1
    except (OSError, ValueError, RuntimeError):
        return False
