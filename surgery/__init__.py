"""Turns a pretrained transformer into its polynomial twin.

    >>> import surgery
    >>> twin, report = surgery.convert("HuggingFaceTB/SmolLM2-135M", degree=2, output="twin")
    >>> model = surgery.load("twin")

A function for every command, imported on first use, so that `import surgery` is quick. Importing this package also lets
transformers' Auto classes load custom-code twins with no trust flag. What a twin costs is measured by `evals.evaluate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.models.registration import register, register_when_possible
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.closed_form.moments import GaussianMixture
    from surgery.conversion.inspection import inspect
    from surgery.conversion.pipeline import convert
    from surgery.conversion.recipe import Recipe
    from surgery.errors import SurgeryError
    from surgery.models.loading import load
    from surgery.publishing.card import card
    from surgery.publishing.export import export
    from surgery.publishing.hub import push
    from surgery.reading.explanation import explain
    from surgery.reading.trace import trace
    from surgery.refining.run import refine
    from surgery.runs.run import run
    from surgery.runtime.trust import trusting_remote_code
    from surgery.saving.report import Report

__all__ = [
    "GaussianMixture", "Recipe", "Report", "SurgeryError", "__version__", "card", "convert", "explain", "export",
    "inspect", "load", "push", "refine", "register", "run", "trace", "trusting_remote_code",
]  # fmt: skip

_PLACES = {
    "GaussianMixture": "surgery.closed_form.moments:GaussianMixture",
    "Recipe": "surgery.conversion.recipe:Recipe",
    "Report": "surgery.saving.report:Report",
    "SurgeryError": "surgery.errors:SurgeryError",
    "card": "surgery.publishing.card:card",
    "convert": "surgery.conversion.pipeline:convert",
    "explain": "surgery.reading.explanation:explain",
    "export": "surgery.publishing.export:export",
    "inspect": "surgery.conversion.inspection:inspect",
    "load": "surgery.models.loading:load",
    "push": "surgery.publishing.hub:push",
    "refine": "surgery.refining.run:refine",
    "run": "surgery.runs.run:run",
    "trace": "surgery.reading.trace:trace",
    "trusting_remote_code": "surgery.runtime.trust:trusting_remote_code",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


register_when_possible()
