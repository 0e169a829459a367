"""The comparison of kinds of text by itself: texts.json and one picture, where the model card finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals import plots
from surgery.runtime.files import not_written, write_bytes, write_json

JSON, PLOT = "texts.json", "texts.png"


def write_kinds(found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes texts.json and texts.png; their paths. Raises EvaluationError where that cannot be done."""
    try:
        write_json(folder / JSON, found, allow_nan=False)
        write_bytes(folder / PLOT, plots.png(*plots.kinds(found)))
    except OSError as error:
        raise not_written(error, "the comparison cannot be written", folder) from error
    return [folder / JSON, folder / PLOT]
