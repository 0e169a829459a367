"""Every model type of the installed transformers, from configuration to reloaded twin: `docs/architectures.md`.

    python -m evals.architectures -o docs/architectures.md                  the whole table (about ten minutes)
    python -m evals.architectures --only llama --only mixtral               a few rows, printed
    python -m evals.architectures --check docs/architectures.md --only llama   do these rows still hold?

A tiny random model of each type is saved, converted from disk at degree 2, saved again, loaded in a fresh process
without this package, and compared there by its outputs and by greedy text.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from tqdm import tqdm

from evals.architectures.tiny_models import inputs, tiny
from surgery.blocks.find import survey
from surgery.conversion.pipeline import convert
from surgery.errors import SurgeryError
from surgery.models import loading
from surgery.saving.checkpoint import save
from surgery.saving.reload import TOLERANCE, main_output, probe_inputs, reload_elsewhere, write_probe
from surgery.saving.reload_check import NEW_TOKENS

FAMILIES = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
ROWS, LENGTH = 128, 24


@dataclass(frozen=True)
class Row:
    """One model type in one family.

    Attributes:
        blocks: how many of each kind, as in "2 gated".
        form: native, custom, or unsupported.
        note: what was left alone, or why nothing could be converted.
    """

    family: str
    model_type: str
    architecture: str
    blocks: str
    form: str
    note: str = ""

    def markdown(self) -> str:
        return f"| {self.model_type} | {self.architecture} | {self.blocks} | {self.form} | {self.note} |"


def types(family: str) -> dict[str, str]:
    """Model types of a family and their class; twins' own classes, which stand beside them for pipelines, left out."""
    from transformers.models.auto import modeling_auto

    from surgery.models.modeling_polynomial import PREFIX

    named = getattr(modeling_auto, FAMILIES[family])
    found = {key: value if isinstance(value, str) else value[0] for key, value in named.items()}
    return {key: value for key, value in found.items() if not value.startswith(PREFIX)}


@dataclass(frozen=True)
class _Converted:
    row: Row
    folder: Path | None = None
    probe: Path | None = None


def sweep(only: Sequence[str] = (), quiet: bool = False) -> list[Row]:
    """Rows in the order of families and types."""
    planned = [(f, t, c) for f in FAMILIES for t, c in types(f).items() if not only or t in only]
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        done = [
            _convert(family, model_type, architecture, Path(place) / f"{number:04d}")
            for number, (family, model_type, architecture) in enumerate(tqdm(planned, unit="type", disable=quiet))
        ]
        saved = [(item.folder, item.probe, item.row.form) for item in done if item.folder and item.probe]
        seen: Iterator[dict[str, Any]] = iter(reload_elsewhere(saved))
        return [_judged(item.row, next(seen)) if item.folder else item.row for item in done]


def _convert(family: str, model_type: str, architecture: str, place: Path) -> _Converted:
    row = Row(family, model_type, architecture, "", "unsupported")
    try:
        model = tiny(getattr(transformers, architecture), model_type, causal=family == "causal")
        given = inputs(model, ROWS, LENGTH)
        with torch.no_grad():
            model(**{name: value[:2] for name, value in given.items()})
    except Exception as error:
        return _Converted(replace(row, form="not built", note=f"no tiny model without network: {_line(error)}"))
    try:
        found = survey(model)
    except Exception as error:
        return _Converted(replace(row, form="failed", note=f"{type(error).__name__}: {_line(error)}"))
    kinds = Counter(block.kind for block in found.blocks)
    row = replace(row, blocks=", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    left = _reasons(found.left_alone)
    if not found.blocks:
        return _Converted(replace(row, note=left or "no feed-forward block was recognised"))
    try:
        model.save_pretrained(place / "original")
        probe = probe_inputs(given)
        if not _survives(model, place / "original", probe):
            return _Converted(replace(row, note="the original itself does not load as it was saved"))
        twin, report = convert(str(place / "original"), text=given, tokens=ROWS * LENGTH, window=LENGTH, degree=2)
        save(twin, None, place / "twin", report.as_dict(), probe, form=report.form, verify=False)
        with torch.no_grad():
            expected = main_output(twin(**probe)).float()
            more = _greedy(twin, probe) if family != "masked" else {}
        write_probe(place / "probe.safetensors", probe, expected, **more)
    except SurgeryError as error:
        return _Converted(replace(row, note=f"{error.what}: {error.cause}" if error.cause else error.what))
    except Exception as error:
        return _Converted(replace(row, form="failed", note=f"{type(error).__name__}: {_line(error)}"))
    row = replace(row, form=report.form, note=_reasons(report.left_alone))
    return _Converted(row, place / "twin", place / "probe.safetensors")


def _survives(model: Any, folder: Path, probe: dict[str, torch.Tensor]) -> bool:
    try:
        again: Any = loading.loaded(str(folder)).model
        with torch.no_grad():
            first, second = (main_output(one(**probe)).float() for one in (model, again))
    except (SurgeryError, RuntimeError):
        return False
    return bool((first - second).norm() <= TOLERANCE["float32"] * first.norm())


def _reasons(left_alone: Sequence[tuple[str, str]]) -> str:
    return "; ".join(dict.fromkeys(reason for _, reason in left_alone))


def _greedy(model: Any, probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    sound = hasattr(model.config, "num_codebooks")  # several rows to a piece, which `generate` wants prepared
    if not model.can_generate() or "input_ids" not in probe or sound:
        return {}
    prompt = probe["input_ids"][:1, :8].clone()
    text = model.generate(prompt, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
    return {"prompt": prompt, "generated": text}


def _judged(row: Row, seen: dict[str, Any]) -> Row:
    if "error" in seen:
        return replace(row, form="failed", note=f"does not load elsewhere: {seen['error'].splitlines()[0][:160]}")
    if seen["missing"] or seen["unexpected"]:
        return replace(
            row, form="failed", note=f"keys missing or left over: {(seen['missing'] + seen['unexpected'])[0]}"
        )
    if not seen["difference"] <= TOLERANCE["float32"]:
        return replace(row, form="failed", note=f"outputs differ by {seen['difference']:.1e} after loading")
    if not seen.get("generates", True):
        return replace(row, form="failed", note="greedy text differs after loading")
    return row


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:160].replace("|", "/")


def document(rows: Sequence[Row]) -> str:
    """The table, by family, with a count of each."""
    parts = [
        "# Architectures\n",
        f"Every model type of transformers {transformers.__version__} in five families: a tiny random model is saved,",
        "converted from disk at degree 2, saved, loaded in a fresh process without this package, and compared there by",
        "its outputs and, where it generates, by greedy text. Made by `python -m evals.architectures -o",
        "docs/architectures.md`. `native`: a stock checkpoint; `custom`: with its own modelling file.\n",
    ]
    for family in FAMILIES:
        mine = [row for row in rows if row.family == family]
        good = sum(row.form in ("native", "custom") for row in mine)
        parts.append(f"## {family}: {good} of {len(mine)}\n")
        parts += ["| model type | class | blocks | form | left alone, or the reason |", "|---|---|---|---|---|"]
        parts += [row.markdown() for row in mine]
        parts.append("")
    return "\n".join(parts)


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="write the whole table here")
@click.option("--check", type=click.Path(exists=True, path_type=Path), help="compare with this table; exit 1 if stale")
@click.option("--only", multiple=True, help="model type, repeatable")
def main(output: Path | None, check: Path | None, only: tuple[str, ...]) -> None:
    rows = sweep(only)
    if output is not None:
        output.write_text(document(rows), encoding="utf-8")
    text = check.read_text(encoding="utf-8").splitlines() if check else []
    stale = [row.markdown() for row in rows if check and row.markdown() not in text]
    for line in stale if check else [row.markdown() for row in rows] if only else []:
        click.echo(line)
    click.echo(f"{len(rows)} rows: " + ", ".join(f"{n} {form}" for form, n in Counter(r.form for r in rows).items()))
    if stale:
        raise SystemExit(1)
