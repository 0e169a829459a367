"""What a conversion did, as it is printed, recorded in `surgery.json` and read back."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from surgery.errors import CheckpointError, RecipeError
from surgery.runtime.files import sha256, write_json
from surgery.runtime.public import public
from surgery.saving.folder import REPORT
from surgery.version import __version__


@dataclass(frozen=True)
class Report:
    """What a conversion did; `as_dict` is what `surgery.json` holds.

    Attributes:
        form: native or custom.
        blocks: one dict per converted block (R² in and out of sample, ridge, condition, sinks, seconds).
        left_alone: (path, reason) for what was not converted.
        perplexity: before, after, nats lost and the tokens measured on; None where not measured.
        companions: files of the original beside its weights: copied, missing (and why), left.
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
    companions: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """What `surgery.json` holds, beside the verification."""
        names: tuple[str, ...] = ("calibration", "companions", "form", "perplexity", "seconds")
        names += () if self.budget is None else ("budget",)
        left = [{"path": path, "reason": reason} for path, reason in self.left_alone]
        about = {"format": 1, "recipe": self.recipe, "source": self.source, "versions": versions()}
        rest = {name: getattr(self, name) for name in names}
        return {**about, **rest, "left_alone": left, "blocks": list(self.blocks)}


def versions() -> dict[str, str]:
    """Of this package and what its figures hang on."""
    found = {"polysurgery": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**found, "python": platform.python_version()}


def read_report(folder: str | Path) -> dict[str, Any]:
    """`surgery.json` of a saved twin."""
    report: dict[str, Any] = json.loads((Path(folder) / REPORT).read_text(encoding="utf-8"))
    return report


def write_report(folder: Path, report: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    """`surgery.json`, with what the verification saw, and of which weights. It names no place on this machine."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.onnx*"), *folder.glob("*.gguf")]
    weights = {file.name: sha256(file) for file in sorted(files)}
    write_json(folder / REPORT, public({**report, "verification": {**seen, "weights": weights}}))


def read_verified_report(folder: Path) -> dict[str, Any]:
    """`surgery.json` of a finished, verified twin. Raises CheckpointError for anything else."""
    if not (folder / "config.json").is_file() or not (folder / REPORT).is_file():
        raise CheckpointError(
            "not a finished twin",
            where=str(folder),
            cause=f"it holds no config.json or no {REPORT}: another folder, or an interrupted conversion",
            fix="name the folder that `surgery convert -o` wrote",
        )
    try:
        report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{REPORT} cannot be read: {error}", where=str(folder)) from error
    if not report.get("verification", {}).get("verified"):
        raise CheckpointError(
            "this twin was never reloaded and compared, or the comparison failed",
            where=str(folder),
            fix="convert again; saving verifies the twin in a fresh process",
        )
    return report


def recorded_original(twin: str | Path) -> tuple[str, str | None]:
    """What a twin says it was converted from: Hub id and revision.

    Raises:
        RecipeError: not a twin's folder, or made from a model that is not on the Hub.
    """
    try:
        source = read_report(twin)["source"]
    except (OSError, KeyError, ValueError):
        source = None
    if source and source["kind"] == "hub":
        return str(source["name"]), source.get("revision")
    made_from = (
        f"the twin was made from {source['name']!r}, which is not on the Hub" if source else "not a twin's folder"
    )
    raise RecipeError("the original is not named", where=str(twin), cause=made_from, fix="give --original MODEL")
