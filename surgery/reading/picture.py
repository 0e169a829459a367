"""What the pictures of an explanation share: a figure to draw in, its file, and a feature's name."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from surgery.errors import SurgeryError

POSITIVE, NEGATIVE = "#1f6feb", "#d1242f"


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches. Raises SurgeryError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SurgeryError("plots need matplotlib", fix="pip install 'polysurgery[explain]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def as_png(figure: Any, dpi: int = 110) -> bytes:
    """Its file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def peaks(contexts: Sequence[dict[str, Any]], most: int | None = None) -> str:
    """The tokens that drive something most, each once, as `examples` found them."""
    found = dict.fromkeys(context["tokens"][context["peak"]] for context in contexts)
    return " ".join(repr(token) for token in list(found)[:most])


def name_of(number: int | str, contexts: Sequence[dict[str, Any]]) -> str:
    """`#123 'word'`: a feature by its number and the tokens that it fires on most."""
    return f"#{number} {peaks(contexts, 2)}".strip()


def label(described: dict[str, Any], number: int) -> str:
    """The name of a feature of `explanation.json`'s `described`."""
    return name_of(number, described.get(str(number), {}).get("contexts", []))
