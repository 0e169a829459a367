"""Measures what a twin costs against its original.

    >>> from evals import evaluate
    >>> report = evaluate("twin", original="HuggingFaceTB/SmolLM2-135M")

Both models and a text come in; perplexity, fidelity, R² per block, lm-eval tasks and speed go out, as data, tables, a
page and plots. Imported on first use, so that importing this package is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["EvalSettings", "evaluate"]

if TYPE_CHECKING:
    from evals.evaluation import evaluate
    from evals.settings import EvalSettings

_PLACES = {"EvalSettings": "evals.settings:EvalSettings", "evaluate": "evals.evaluation:evaluate"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        import importlib

        module, _, inside = _PLACES[name].partition(":")
        return getattr(importlib.import_module(module), inside)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
