"""The model card of a twin, made from its saved reports and never typed.

Reads `surgery.json` and, where they stand in the twin's `evaluation/`, `evaluation.json` (`surgery eval TWIN -o
TWIN/evaluation`) and `texts.json` (the comparison of kinds of text).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml

from surgery.models import modeling_polynomial
from surgery.runtime.files import write_text
from surgery.runtime.public import in_markdown, public
from surgery.runtime.vocabulary import understands_former_names
from surgery.saving.evaluation import headline_rows, kind_rows, task_rows, trust_notes, unseen_line
from surgery.saving.report import read_verified_report

EVALUATION = Path("evaluation") / "evaluation.json"
PLOT = Path("evaluation") / "blocks.png"
TEXTS, TEXTS_PLOT = Path("evaluation") / "texts.json", Path("evaluation") / "texts.png"
COMPARED_PLOT = Path("evaluation") / "twins.png"  # this twin beside others of the same model


READERS = {
    "processor_config.json": "AutoProcessor",
    "tokenizer_config.json": "AutoTokenizer",
    "preprocessor_config.json": "AutoImageProcessor",
}
"""What prepares a twin's inputs, by the file that it is read from."""


@dataclass(frozen=True)
class Card:
    """A card's text, and what could not be said."""

    text: str
    missing: tuple[str, ...]


def render_card(folder: Path, base_model: str | None = None, license: str | None = None) -> Card:
    """The card.

    Args:
        base_model: Hub id of the original, where the twin was made from a file and does not know it.
        license: the original's; looked up on the Hub where the original is there.
    """
    import jinja2

    report = public(read_verified_report(folder))
    source, missing = report["source"], []
    base = base_model or (source["name"] if source["kind"] == "hub" else None)
    if base is None:
        missing.append("the base model's Hub id (--base-model)")
    license = license or (_licence_of(base, source.get("revision")) if base else None)
    if license is None:
        missing.append("the licence (--license): it is the original's, and could not be looked up")
    evaluation = None
    if (folder / EVALUATION).is_file():
        evaluation = public(json.loads((folder / EVALUATION).read_text(encoding="utf-8")))
        headline, tasks, notes = (
            headline_rows(evaluation),
            task_rows(evaluation),
            trust_notes(evaluation | {"reused": []}),
        )
    else:
        headline, tasks, notes = [], [], []
        missing.append("an evaluation (surgery eval TWIN -o TWIN/evaluation)")
    if evaluation and report.get("exported_from"):
        notes = [*notes, f"Measured on {report['exported_from']}, of which this is another form."]
    texts = (evaluation or {}).get("kinds")
    if texts is None and (folder / TEXTS).is_file():
        texts = public(json.loads((folder / TEXTS).read_text(encoding="utf-8")))
    pictures = [str(plot) for plot in (COMPARED_PLOT, TEXTS_PLOT) if (folder / plot).is_file()]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name, options = _loaded_as(report, config)
    reader = next((reader for file, reader in READERS.items() if (folder / file).is_file()), None)
    recipe = {key: value for key, value in report["recipe"].items() if value is not None and key != "output"}
    template = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    text: str = (
        jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_inline)
        .from_string(template)
        .render(
            front=_Lines(_front_matter(report, config, base, license)), base=base, report=report, source=source,
            form=report["form"], license=license,
            recipe=_Lines(yaml.safe_dump(recipe, sort_keys=False, width=math.inf).strip()),
            blocks=report["blocks"], evaluated=bool(evaluation),
            headline=headline, tasks=tasks, notes=notes, plot=str(PLOT) if (folder / PLOT).is_file() else None,
            texts=kind_rows(texts) if texts else [], over_texts=unseen_line(texts) if texts else "",
            texts_plot=pictures[0] if pictures else None,
            variable="processor" if reader in ("AutoProcessor", "AutoImageProcessor") else "tokenizer",
            generates=reader == "AutoTokenizer" and name == "AutoModelForCausalLM",
            checkpoint=_checkpoint_row(report, config), check=_check_row(report["verification"], report["form"]),
            engine=report["verification"].get("engine"),
            refinement=report.get("refinement"),
            quadratic=_degrees(report) == [2], degrees=" or ".join(map(str, _degrees(report))),
            kept=[path for path, degree in (report.get("budget") or {}).get("degrees", {}).items() if degree == 0],
            auto=name, options=options, reader=reader,
        )
    )  # fmt: skip
    return Card(text, tuple(missing))


class _Lines(str):
    """Text of several lines that goes into the card as it is."""


def _inline(value: Any) -> Any:
    """What came from a checkpoint or a file, on one line of Markdown, and nothing but text."""
    return in_markdown(value) if isinstance(value, str) and not isinstance(value, _Lines) else value


def _loaded_as(report: dict[str, Any], config: dict[str, Any]) -> tuple[str, str]:
    """The Auto class that a twin is loaded with, and what else `from_pretrained` is given."""
    architecture = config.get("base_architecture", config["architectures"][0])
    base = getattr(transformers, architecture)
    names = [name for name in modeling_polynomial.auto_classes() if base in _served(name, base.config_class)]
    favourites = [name for name in ("AutoModelForCausalLM", *names) if name in names]
    return (favourites or ["AutoModel"])[0], ", trust_remote_code=True" if report["form"] == "custom" else ""


def _served(auto_class: str, config_class: type) -> tuple[Any, ...]:
    entry = getattr(transformers, auto_class)._model_mapping.get(config_class, None)
    return entry if isinstance(entry, tuple) else (entry,)


def _checkpoint_row(report: dict[str, Any], config: dict[str, Any]) -> str:
    """Which form this is."""
    architecture, made_from = config["architectures"][0], report["source"]["architecture"]
    kin = "" if made_from == architecture else f", as which `{made_from}` can be written exactly"
    return {
        "native": f"native: stock `{architecture}`{kin}",
        "silu": f"stock `{architecture}`, every block a SwiGLU of twice the width",
        "onnx": "ONNX graph",
        "encrypted": "scaled blocks for CKKS, `blocks.safetensors`",
        "gguf": f"GGUF, `{report['verification'].get('file')}`, every block a SwiGLU of twice the width",
        "delta": f"delta of {config.get('polynomial_delta', {}).get('base')}: what the twin adds to it",
    }.get(report["form"], f"custom code, `modeling_polynomial.py` (format {report['format']})")


def _check_row(seen: dict[str, Any], form: str) -> str:
    """How the checkpoint was compared with the twin, and what that saw."""
    difference = f"{seen['difference']:.1e}"
    in_engine = f"log-probabilities in llama.cpp differ by {difference}"
    return {
        "delta": "applied to the original it gives every bit of the twin",
        "onnx": f"outputs in onnxruntime differ by {difference} (relative)",
        "encrypted": f"one block computed on encrypted numbers differs by {difference} (relative)"
        if seen.get("engine")
        else f"scaled blocks differ by {difference} (relative)",
        "gguf": in_engine if seen.get("engine") else f"read back: a tensor differs by {difference} (relative)",
    }.get(form, f"outputs of a fresh process differ by {difference} (relative)")


def _front_matter(report: dict[str, Any], config: dict[str, Any], base: str | None, license: str | None) -> str:
    """YAML between the dashes: what the Hub reads."""
    architecture = config["architectures"][0]
    data: dict[str, Any] = {"library_name": "transformers"}
    if license:
        data["license"] = license
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
    license = data.get("license") if data else None
    return str(license) if license else None


@understands_former_names
def card(twin: str | Path, *, base_model: str | None = None, license: str | None = None) -> Card:
    """Writes a twin's model card into its folder as README.md, from its saved reports.

    Args:
        twin: folder of a finished twin.
        base_model: Hub id of the original, where the twin was made from a file and does not know it.
        license: the original's; looked up on the Hub where the original is there.
    Returns:
        the text, and what could not be said.
    Raises:
        CheckpointError: not a finished twin.
    """
    made = render_card(Path(twin), base_model, license)
    write_text(Path(twin) / "README.md", made.text)
    return made
