"""The model card of a twin, made from its saved reports and never typed.

Reads `surgery.json` and, where `surgery eval TWIN -o TWIN/evaluation` has left one, `evaluation/evaluation.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surgery.checkpoint import REPORT
from surgery.errors import CheckpointError

EVALUATION = Path("evaluation") / "evaluation.json"
PLOT = Path("evaluation") / "blocks.png"


@dataclass(frozen=True)
class Card:
    """A card's text, and what could not be said."""

    text: str
    missing: tuple[str, ...]


def read_twin(folder: Path) -> dict[str, Any]:
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


def render(folder: Path, base_model: str | None = None, licence: str | None = None) -> Card:
    """The card.

    Args:
        base_model: Hub id of the original, where the twin was made from a file and does not know it.
        licence: the original's; looked up on the Hub where the original is there.
    """
    import jinja2

    report = read_twin(folder)
    source, missing = report["source"], []
    base = base_model or (source["name"] if source["kind"] == "hub" else None)
    if base is None:
        missing.append("the base model's Hub id (--base-model)")
    licence = licence or (_licence_of(base, source.get("revision")) if base else None)
    if licence is None:
        missing.append("the licence (--license): it is the original's, and could not be looked up")
    evaluation = None
    if (folder / EVALUATION).is_file():
        evaluation = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        from evals import report as tables

        headline, tasks, notes = tables.headline(evaluation), tables.task_rows(evaluation), tables.notes(evaluation)
    else:
        headline, tasks, notes = [], [], []
        missing.append("an evaluation (surgery eval TWIN -o TWIN/evaluation)")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    recipe = {key: value for key, value in report["recipe"].items() if value is not None and key != "output"}
    template = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    text: str = (
        jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            front=_front_matter(report, config, base, licence), base=base, report=report, source=source,
            form=report["form"], licence=licence,
            recipe=yaml.safe_dump(recipe, sort_keys=False).strip(), blocks=report["blocks"], evaluated=bool(evaluation),
            headline=headline, tasks=tasks, notes=notes, plot=str(PLOT) if (folder / PLOT).is_file() else None,
            checkpoint=_checkpoint_row(report, config),
            refinement=report.get("refinement"),
            quadratic=_degrees(report) == [2], degrees=" or ".join(map(str, _degrees(report))),
            kept=[path for path, degree in (report.get("budget") or {}).get("degrees", {}).items() if degree == 0],
            causal="ForCausalLM" in config["architectures"][0]
            or "LMHead" in config["architectures"][0],
        )
    )  # fmt: skip
    return Card(text, tuple(missing))


def _checkpoint_row(report: dict[str, Any], config: dict[str, Any]) -> str:
    """Which form this is."""
    architecture, made_from = config["architectures"][0], report["source"]["architecture"]
    kin = "" if made_from == architecture else f", as which `{made_from}` can be written exactly"
    return {
        "native": f"native: stock `{architecture}`{kin}",
        "silu": f"stock `{architecture}`, every block a SwiGLU of twice the width",
        "onnx": "ONNX graph",
        "delta": f"delta of {config.get('polynomial_delta', {}).get('base')}: what the twin adds to it",
    }.get(report["form"], f"custom code, `modeling_polynomial.py` (format {report['format']})")


def _front_matter(report: dict[str, Any], config: dict[str, Any], base: str | None, licence: str | None) -> str:
    """YAML between the dashes: what the Hub reads."""
    architecture = config["architectures"][0]
    data: dict[str, Any] = {"library_name": "transformers"}
    if licence:
        data["license"] = licence
    if base:
        data |= {"base_model": base, "base_model_relation": "finetune"}
    if "ForCausalLM" in architecture or "LMHead" in architecture:
        data["pipeline_tag"] = "text-generation"
    data["tags"] = ["polynomial", "polysurgery", "interpretability", *(f"degree-{n}" for n in _degrees(report))]
    if report["form"] == "native":
        data["tags"].append("bilinear")
    return yaml.safe_dump(data, sort_keys=False).strip()


def _degrees(report: dict[str, Any]) -> list[int]:
    """Of the blocks, each once."""
    own = report["recipe"]["degree"]
    return sorted({row.get("degree", own) for row in report["blocks"]}) or [own]


def _licence_of(base: str, revision: str | None) -> str | None:
    """The licence on the original's card; None where the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        data = HfApi().model_info(base, revision=revision).card_data
    except Exception:
        return None
    licence = data.get("license") if data else None
    return str(licence) if licence else None


def write(folder: Path, base_model: str | None = None, licence: str | None = None) -> Card:
    """Renders the card into the twin's folder as README.md."""
    card = render(folder, base_model, licence)
    temporary = folder / ".README.md.tmp"
    temporary.write_text(card.text, encoding="utf-8")
    temporary.replace(folder / "README.md")
    return card
