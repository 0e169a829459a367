"""A twin in other forms: for engines that take SiLU for granted, for llama.cpp, as an ONNX graph, as a delta, and whole
again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.errors import RecipeError, did_you_mean
from surgery.publishing.delta import export_delta, export_full
from surgery.publishing.gguf import export_gguf
from surgery.publishing.onnx import export_onnx
from surgery.publishing.silu import export_silu
from surgery.runtime.vocabulary import understands_former_names

FORMS = ("silu", "gguf", "onnx", "delta", "full")


@understands_former_names
def export(
    twin: str | Path,
    output: str | Path,
    *,
    form: str = "silu",
    original: str | None = None,
    weights: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a twin in another form, and believes it only once it computes the same there.

    Args:
        twin: folder of a finished twin; `output`: folder for the export.
        form: `silu`, an ordinary SwiGLU network of twice the width (native twins); `gguf`, the same as a
            file for llama.cpp; `onnx`, a graph for onnxruntime;
            `delta`, what the twin adds to its original; `full`, the whole twin again, from a delta.
        original: for `delta` and `full`: Hub id, folder or .gguf; by default as the twin's report names it. For
            `gguf`: a .gguf file whose tokenizer is taken as it is; by default the twin's own is written.
        weights: for `gguf`: f32, bf16, f16 or q8_0; by default the precision that the twin is stored in.
        overwrite: replace an earlier twin at the output.
    Returns:
        `form`, and `difference`, relative norm over the outputs' (0 for a delta, which gives every bit); of a delta
        also `bytes` and `twin_bytes`, of a graph its `operators`, of a GGUF file its name (`file`), `bytes` and
        what the engine saw.
    Raises:
        SurgeryError: not a finished twin, a form it does not have, a package that is missing, other outputs.
    """
    folder, out = Path(twin), Path(output)
    if form not in FORMS:
        raise RecipeError(f"no form {form!r}{did_you_mean(form, FORMS)}", fix=f"one of {', '.join(FORMS)}")
    if weights is not None and form != "gguf":
        raise RecipeError(
            "only a GGUF file's weights have a type", where="--weights", fix="leave it, or give --form gguf"
        )
    if form == "gguf":
        seen = export_gguf(folder, out, original, overwrite, weights)
    elif form == "silu":
        seen = export_silu(folder, out, overwrite)
    else:
        seen = {"delta": export_delta, "full": export_full, "onnx": export_onnx}[form](folder, out, original, overwrite)
    return {**seen, "form": form}
