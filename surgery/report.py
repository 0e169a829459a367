"""What a conversion did, as it is printed, recorded in `surgery.json` and read back."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from surgery import checkpoint
from surgery.fit import FittedBlock
from surgery.fit_experts import FittedExperts


@dataclass(frozen=True)
class Report:
    """What a conversion did; `as_dict` is what `surgery.json` holds.

    Attributes:
        form: native or custom.
        blocks: one dict per converted block (R² in and out of sample, ridge, condition, sinks, seconds).
        left_alone: (path, reason) for what was not converted.
        perplexity: before, after, nats lost and the tokens measured on; None where not measured.
        budget: what each block costs and what was chosen, where a budget was given.
    """

    recipe: dict[str, Any]
    source: dict[str, Any]
    calibration: dict[str, Any]
    form: str
    blocks: tuple[dict[str, Any], ...]
    left_alone: tuple[tuple[str, str], ...]
    perplexity: dict[str, Any] | None
    seconds: dict[str, float]
    budget: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        import torch
        import transformers

        from surgery import __version__

        return {
            "format": 1,
            "recipe": self.recipe,
            "source": self.source,
            "versions": {
                "polysurgery": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "calibration": self.calibration,
            "form": self.form,
            "perplexity": self.perplexity,
            "seconds": self.seconds,
            **({} if self.budget is None else {"budget": self.budget}),
            "left_alone": [{"path": path, "reason": reason} for path, reason in self.left_alone],
            "blocks": list(self.blocks),
        }


def block_row(fitted: FittedBlock | FittedExperts, seconds: float) -> dict[str, Any]:
    """One block's line in the report. Of experts: sums of counts, else the median over those that saw enough tokens."""
    if isinstance(fitted, FittedExperts):
        rows = [block_row(one, 0) for number, one in enumerate(fitted.experts) if number not in fitted.starved]
        rows = rows or [block_row(one, 0) for one in fitted.experts]
        summed = ("sink_tokens", "sink_units", "sink_mistaken")
        together = {
            key: sum(row[key] for row in rows) if key in summed else median(row[key] for row in rows)
            for key, value in rows[0].items() if isinstance(value, int | float)
        }  # fmt: skip
        return {
            "path": fitted.block.path, "kind": "experts", "activation": fitted.block.activation,
            **together, "degree": fitted.degree,
            "ridge": None, "tokens": sum(fitted.tokens), "seconds": round(seconds, 3),
            "experts": len(fitted.experts), "tokens_by_expert": list(fitted.tokens), "starved": list(fitted.starved),
        }  # fmt: skip
    return {
        "path": fitted.block.path,
        "kind": fitted.block.kind,
        "activation": fitted.block.activation,
        "degree": fitted.degree,
        "r2_fit": fitted.r2_fit,
        "r2_held": fitted.r2_held,
        "r2_units_median": fitted.r2_units,
        "ridge": fitted.ridge,
        "condition": fitted.condition,
        "sink_tokens": fitted.sink_tokens,
        "sink_units": fitted.sink_units,
        "sink_mistaken": fitted.mistaken,
        "sink_error": fitted.sink_error,
        "quadrature_error": fitted.quadrature_error,
        "tokens": fitted.tokens,
        "seconds": round(seconds, 3),
    }


def read_report(folder: str | Path) -> dict[str, Any]:
    """`surgery.json` of a saved twin."""
    report: dict[str, Any] = json.loads((Path(folder) / checkpoint.REPORT).read_text(encoding="utf-8"))
    return report
