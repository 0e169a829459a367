"""A twin in other forms: as ordinary SwiGLU, for llama.cpp, as an ONNX graph, for inference on encrypted numbers, as a
delta, and whole again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.errors import RecipeError, did_you_mean
from surgery.publishing.card import EVALUATION
from surgery.publishing.delta import export_delta, export_full
from surgery.publishing.encrypted import export_encrypted
from surgery.publishing.gguf import export_gguf
from surgery.publishing.onnx import export_onnx
from surgery.publishing.silu import export_silu
from surgery.runtime.files import write_bytes
from surgery.runtime.vocabulary import understands_former_names

FORMS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "silu": (export_silu, ()),
    "gguf": (export_gguf, ("original", "weights")),
    "onnx": (export_onnx, ("original",)),
    "encrypted": (export_encrypted, ("text", "tokens", "quiet")),
    "delta": (export_delta, ("original",)),
    "full": (export_full, ("original",)),
}
"""What writes each form, and the settings it takes."""
SHOWN = (".json", ".md", ".html", ".png")  # of an evaluation


@understands_former_names
def export(
    twin: str | Path,
    output: str | Path,
    *,
    form: str = "silu",
    original: str | None = None,
    weights: str | None = None,
    text: str | None = None,
    tokens: int | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Writes a twin in another form, and believes it only once it computes the same there. Its evaluation goes along.

    Args:
        twin: folder of a finished twin; `output`: folder for the export.
        form: `silu`, an ordinary SwiGLU network of twice the width (native twins); `gguf`, the same as a file for
            llama.cpp; `onnx`, a graph for onnxruntime; `encrypted`, blocks of degree 2 for inference on encrypted
            numbers; `delta`, what the twin adds to its original; `full`, the whole twin again, from a delta.
        original: for `delta`, `full` and what is made of a delta: Hub id, folder or .gguf; by default as the twin's
            report names it. For `gguf`: a .gguf file whose tokenizer is taken as it is; by default the twin's own is
            written.
        weights: for `gguf`: f32, bf16, f16, q8_0, q5_1, q5_0, q4_1 or q4_0; by default the precision that the twin is
            stored in.
        text, tokens: for `encrypted`: what the units' ranges are measured on, see
            :func:`surgery.publishing.encrypted.export_encrypted`.
        overwrite: replace an earlier twin at the output.
        quiet: no progress bar.
    Returns:
        `form`, and `difference`, relative norm over the outputs' (0 for a delta, which gives every bit); of a delta
        also `bytes` and `twin_bytes`, of a graph its `operators`, of a GGUF file and of encrypted blocks what the
        engine saw.
    Raises:
        SurgeryError: not a finished twin, a form it does not have, a setting that the form does not take, a package
            that is missing, other outputs.
    """
    if form not in FORMS:
        raise RecipeError(f"no form {form!r}{did_you_mean(form, FORMS)}", fix=f"one of {', '.join(FORMS)}")
    run, takes = FORMS[form]
    all_given = {"original": original, "weights": weights, "text": text, "tokens": tokens}
    given: dict[str, Any] = {name: value for name, value in all_given.items() if value is not None}
    for name in given:
        if name not in takes:
            fitting = ", ".join(other for other, (_, taken) in FORMS.items() if name in taken)
            raise RecipeError(f"the form {form} takes no {name}", where=f"--{name}", fix=f"it is for --form {fitting}")
    if "quiet" in takes:
        given["quiet"] = quiet
    seen = run(Path(twin), Path(output), overwrite=overwrite, **given)
    _carry_evaluation(Path(twin), Path(output))
    return {**seen, "form": form}


def _carry_evaluation(twin: Path, out: Path) -> None:
    """What was measured of the twin goes along: the form computes the same, and the card says what was measured."""
    for file in sorted((twin / EVALUATION.parent).glob("*")):
        if file.is_file() and file.suffix in SHOWN:
            write_bytes(out / EVALUATION.parent / file.name, file.read_bytes())
