"""A twin as a GGUF file for llama.cpp and what is built on it.

llama.cpp knows no bilinear block, so the file holds the SiLU form (:mod:`surgery.publishing.silu`), with the biases of
its feed-forward maps. It is believed once llama.cpp itself computes the same, or, where that is not installed, once it
was read back.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.errors import ModelError, RecipeError, SurgeryError, did_you_mean
from surgery.models import loading
from surgery.models.refusals import GGUF_MARK
from surgery.publishing import gguf_network, gguf_tokenizer, llama_cpp
from surgery.publishing.silu import as_silu
from surgery.saving.folder import check_target, whole_folder
from surgery.saving.report import read_verified_report, write_report
from surgery.version import __version__

STORED = {"f32": 1e-7, "bf16": 4e-3, "f16": 1e-3, "q8_0": 2e-2, "q5_1": 6e-2, "q5_0": 6e-2, "q4_1": 0.12, "q4_0": 0.12}
"""Types of the weights, and the largest relative error of a matrix stored so. Norms and biases stay in float32."""
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
LARGEST = {"f16": 65504.0}
OF_PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def export_gguf(
    folder: Path, out: Path, original: str | None = None, overwrite: bool = False, weights: str | None = None
) -> dict[str, Any]:
    """Saves `NAME-TYPE.gguf` with the twin's report; what the engine saw.

    Args:
        original: a GGUF file whose tokenizer is taken as it is; else the twin's own tokenizer is written.
        weights: f32, bf16, f16, q8_0, q5_1, q5_0, q4_1 or q4_0; by default the precision that the twin is stored in.
    Raises:
        SurgeryError: gguf is not installed, no such type, not a native twin of a Llama, a tokenizer or rotary angles
            that llama.cpp does not know, weights too large for the type, or the engine computes something else.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise SurgeryError("gguf is not installed", fix="pip install 'polysurgery[gguf]'") from error
    if weights is not None and weights not in STORED:
        raise RecipeError(f"no type {weights!r}{did_you_mean(weights, STORED)}", fix=f"one of {', '.join(STORED)}")
    if original is not None and not (original.endswith(".gguf") and Path(original).is_file()):
        raise RecipeError("not a GGUF file", where="--original", fix="name one, or leave it: the twin has a tokenizer")
    report = read_verified_report(folder)
    out = check_target(out, overwrite)
    loaded = loading.loaded(str(folder))
    network = as_silu(loaded.model)
    kind = weights or OF_PRECISION[loaded.source.dtype]
    words = (
        gguf_tokenizer.fields_of(loaded.tokenizer, network.config.vocab_size)
        if original is None
        else gguf_tokenizer.fields_of_file(Path(original), network.config.vocab_size)
    )
    fields = [*_described(report), *_numbers(gguf_network.settings(network)), *words]
    with whole_folder(out) as place:
        file = place / f"{folder.resolve().name}-{kind.upper()}.gguf"
        _write(file, fields, network, kind)
        seen = _checked(file, network, loaded.tokenizer, kind, foreign=original is not None)
        network.config.save_pretrained(place)
        seen = {"verified": True, "form": "gguf", "file": file.name, "weights": kind, **seen}
        write_report(place, {**report, "form": "gguf", "exported_from": folder.name}, seen)
    return {**seen, "bytes": (out / file.name).stat().st_size}


def _described(report: dict[str, Any]) -> list[gguf_tokenizer.Field]:
    """What the file is: whose twin, of which degree, and what it lost."""
    source, degree = report["source"], report["recipe"]["degree"]
    name = source["name"].rsplit("/", 1)[-1].removesuffix(".gguf")
    lost, text = _loss(report)
    cost = "" if lost is None else f" It loses {lost:+.4f} nats a token on {text}."
    told = f"Polynomial twin of {name}: every feed-forward block is a polynomial of degree {degree}.{cost}"
    texts = {
        "general.name": f"{name} polynomial twin",
        "general.description": told,
        "general.quantized_by": f"polysurgery {__version__}",
        "general.base_model.0.name": name,
    }
    if source["kind"] == "hub":
        texts["general.base_model.0.repo_url"] = f"https://huggingface.co/{source['name']}"
    fields = [gguf_tokenizer.Field(key, value, "STRING") for key, value in texts.items()]
    fields += [
        gguf_tokenizer.Field("general.base_model.count", 1, "UINT32"),
        gguf_tokenizer.Field("general.tags", ["polynomial", f"degree-{degree}"], "ARRAY", "STRING"),
        gguf_tokenizer.Field(GGUF_MARK, degree, "UINT32"),
    ]
    return fields + ([] if lost is None else [gguf_tokenizer.Field("polysurgery.nats_lost", lost, "FLOAT32")])


def _loss(report: dict[str, Any]) -> tuple[float | None, str]:
    """Nats lost as the twin is now, and on what; None where nobody measured."""
    if "refinement" in report:
        refined = report["refinement"]
        return refined["lost_after"], f"{refined['held_out_tokens']:,} held-out tokens of what it was refined on"
    measured = report.get("perplexity")
    return (measured["nats"], measured["text"]) if measured else (None, "")


def _numbers(settings: dict[str, int | float]) -> list[gguf_tokenizer.Field]:
    return [
        gguf_tokenizer.Field(
            f"{gguf_network.ARCHITECTURE}.{name}", value, "FLOAT32" if isinstance(value, float) else "UINT32"
        )
        for name, value in settings.items()
    ]


def _write(file: Path, fields: list[gguf_tokenizer.Field], network: Any, kind: str) -> None:
    """Header, fields and tensors; one tensor at a time is converted."""
    import gguf
    import numpy

    writer = gguf.GGUFWriter(file, gguf_network.ARCHITECTURE)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = gguf.GGUFValueType
    for field in fields:
        inner = None if field.inner is None else types[field.inner]
        writer.add_key_value(field.name, field.value, types[field.kind], inner)
    for name, value in gguf_network.weights(network):
        stored = _type_of(value, kind)
        if value.abs().max() > LARGEST.get(stored.name.lower(), float("inf")):
            raise ModelError(
                f"{name} holds {float(value.abs().max()):,.0f}, more than {stored.name} can",
                fix="--weights bf16 or f32",
            )
        shape = gguf.quant_shape_to_byte_shape(value.shape, stored)
        writer.add_tensor_info(name, shape, numpy.dtype(numpy.uint8), math.prod(shape), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, value in gguf_network.weights(network):
        writer.write_tensor_data(gguf.quants.quantize(value.numpy(), _type_of(value, kind)))
    writer.close()


def _type_of(value: Tensor, kind: str) -> Any:
    """Vectors stay in float32, and matrices whose rows are no whole blocks of 32 numbers are not quantised."""
    import gguf

    types = gguf.GGMLQuantizationType
    if value.dim() < 2:
        return types.F32
    return types.F16 if kind.startswith("q") and value.shape[-1] % 32 else types[kind.upper()]


def _checked(file: Path, network: Any, tokenizer: Any, kind: str, foreign: bool) -> dict[str, Any]:
    """What the file holds, and what llama.cpp computes where it is installed.

    Args:
        foreign: the tokenizer is the original file's, which transformers may read otherwise than llama.cpp does.
    """
    read_back = _read_back(file, network, kind)
    if not llama_cpp.installed():
        return {"engine": None, "difference": read_back}
    seen = llama_cpp.seen_in_engine(file, network, tokenizer)
    if not seen.difference < llama_cpp.TOLERANCE[kind]:
        raise ModelError(
            f"llama.cpp computes something else: log-probabilities differ by {seen.difference:.2f}", where=file.name
        )
    if not (seen.same_tokens or foreign):
        raise ModelError(
            "llama.cpp cuts text into other tokens",
            where=file.name,
            fix="name the original's GGUF file with --original: its tokenizer is taken as it is",
        )
    return vars(seen)


def _read_back(file: Path, network: Any, kind: str) -> float:
    """Largest relative error of a tensor in the file."""
    import gguf

    held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    worst = 0.0
    for name, value in gguf_network.weights(network):
        tensor = held.pop(name)
        found = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view_as(value)
        worst = max(worst, float((found - value).norm() / value.norm().clamp_min(1e-30)))
    if held or not worst <= STORED[kind]:
        raise ModelError(f"the file holds something else: relative error {worst:.1e}, too many: {sorted(held)}")
    return worst
