"""Turns a pretrained transformer into its polynomial twin.

    >>> import surgery
    >>> twin, report = surgery.convert("HuggingFaceTB/SmolLM2-135M", degree=2, output="twin")
    >>> model = surgery.load("twin")

The verbs are imported on first use, so that `import surgery` is quick. Importing this package also lets transformers'
Auto classes load custom-code twins with no trust flag.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.registration import register, register_when_possible

__version__ = "0.1.0"
__all__ = ["Recipe", "Report", "SurgeryError", "convert", "inspect", "load", "register"]

if TYPE_CHECKING:
    from surgery.errors import SurgeryError
    from surgery.inspection import inspect
    from surgery.pipeline import convert
    from surgery.recipe import Recipe
    from surgery.report import Report

_PLACES = {
    "convert": "surgery.pipeline",
    "inspect": "surgery.inspection",
    "Report": "surgery.report",
    "Recipe": "surgery.recipe",
    "SurgeryError": "surgery.errors",
}


def load(name: str, **options: Any) -> Any:
    """A model (original or twin) ready to use. Options as in :func:`surgery.loading.load`."""
    from surgery import loading

    return loading.load(name, **options).model


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_when_possible()
