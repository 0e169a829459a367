"""A twin in other forms: for engines that take SiLU for granted, as a delta, and from a delta back to the whole.

A bilinear block is a SwiGLU of twice the width, exactly, since silu(y) − silu(−y) = y:

    g ⊙ u = silu(g) ⊙ u + silu(−g) ⊙ (−u),    gate = [g; −g], up = [u; −u], down = [D, D]
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from surgery import checkpoint, delta, loading
from surgery.blocks import survey
from surgery.card import read_twin
from surgery.errors import ModelError
from surgery.swap import ACTIVATION_KEYS


def as_silu(model: Any) -> Any:
    """The same function as an ordinary SwiGLU network of the stock class.

    Raises:
        ModelError: not a native bilinear twin.
    """
    keys = [key for key in ACTIVATION_KEYS if getattr(model.config, key, None) == "linear"]
    if not keys or not getattr(model.config, "mlp_bias", False):
        raise ModelError(
            "only a native twin of degree 2 has a SiLU form",
            where=type(model).__name__,
            cause="its blocks are not bilinear, or the architecture has no mlp_bias",
            fix="convert a Llama-like model with --degree 2",
        )
    config = copy.deepcopy(model.config)
    for key in keys:
        setattr(config, key, "silu")
    config.intermediate_size *= 2
    with torch.device("meta"):
        wide = type(model)._from_config(config)
    wide = wide.to_empty(device=model.device).to(model.dtype)
    state = dict(model.state_dict())
    for block in survey(wide).blocks:
        for part, join in (("gate_proj", _opposed), ("up_proj", _opposed), ("down_proj", _twice)):
            name = f"{block.path}.{part}"
            state[f"{name}.weight"] = join(state[f"{name}.weight"])
            if part != "down_proj":
                state[f"{name}.bias"] = join(state[f"{name}.bias"])
    wide.load_state_dict(state)
    for name, buffer in model.named_buffers():  # rotary frequencies and the like are in no state dict
        holder, _, leaf = name.rpartition(".")
        setattr(wide.get_submodule(holder), leaf, buffer)
    if getattr(model, "generation_config", None) is not None:
        wide.generation_config = copy.deepcopy(model.generation_config)
    wide.tie_weights()
    wide.train(False)
    return wide


def _opposed(rows: Tensor) -> Tensor:
    return torch.cat([rows, -rows])


def _twice(columns: Tensor) -> Tensor:
    return torch.cat([columns, columns], dim=1)


def export_silu(folder: Path, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Saves the SiLU form of a twin, verified in a fresh process; what the verification saw."""
    report = read_twin(folder)
    out = checkpoint.check_target(out, overwrite)
    loaded = loading.load(str(folder))
    model: Any = loaded.model
    wide = as_silu(model)
    probe = _probe(model)
    with torch.no_grad():
        before, after = (checkpoint.main_output(network(**probe)) for network in (model, wide))
    if not float((after - before).norm() / before.norm()) < checkpoint.TOLERANCE["float32"]:
        raise ModelError("the exported network computes something else than the twin", where=str(folder))
    described = {**report, "form": "silu", "exported_from": folder.name}
    return checkpoint.save(wide, loaded.tokenizer, out, described, probe, dtype=loaded.source.dtype, native=True)


def export_delta(folder: Path, out: Path, base: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Saves what a twin adds to its original, verified bit by bit; sizes in bytes of the delta and of the twin.

    Args:
        base: the original: Hub id, folder or .gguf; by default as the twin's report names it.
    """
    report = read_twin(folder)
    out = checkpoint.check_target(out, overwrite)
    source = report["source"]
    if base is None and source["kind"] != "hub":
        raise ModelError(
            f"the twin was made from {source['name']!r}, which is not on the Hub",
            where=str(folder),
            fix="name the original with --base",
        )
    twin = loading.load(str(folder), dtype="auto")
    stored = twin.source.dtype
    original = loading.load(base or source["name"], None if base else source["revision"], stored)
    network: Any = twin.model
    found = delta.difference(network, original.model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[delta.KEY] = {
        "format": delta.FORMAT, "base": original.source.name, "kind": original.source.kind,
        "revision": original.source.revision, "sha256": delta.fingerprint(original.model), "dtype": stored,
        "derived": found.derived,
    }  # fmt: skip
    with checkpoint.whole_folder(out) as place:
        save_file(found.tensors, place / delta.WEIGHTS)
        checkpoint.write_json(place / "config.json", config)
        shutil.copy(folder / "modeling_polynomial.py", place)
        again: Any = loading.load(str(place), dtype="auto", base=base).model
        ours, theirs = network.state_dict(), again.state_dict()
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            raise ModelError("the delta does not give the twin back", where=str(folder))
        seen = {"verified": True, "form": "delta", "difference": 0.0}
        checkpoint.write_report(place, {**report, "form": "delta", "exported_from": folder.name}, seen)
    whole = sum(value.numel() * value.element_size() for value in network.parameters())
    return {**seen, "bytes": found.size, "twin_bytes": whole}


def export_full(folder: Path, out: Path, base: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Saves the whole twin a delta stands for, verified in a fresh process; what the verification saw."""
    report = read_twin(folder)
    if report["form"] != "delta":
        raise ModelError("not a delta", where=str(folder), cause="it is a whole twin already")
    out = checkpoint.check_target(out, overwrite)
    loaded = loading.load(str(folder), dtype="auto", base=base)
    probe = _probe(loaded.model)
    described = {key: value for key, value in report.items() if key != "exported_from"} | {"form": "custom"}
    return checkpoint.save(loaded.model, loaded.tokenizer, out, described, probe, dtype=loaded.source.dtype)


def export(form: str, folder: Path, out: Path, base: str | None = None, overwrite: bool = False) -> str:
    """Writes one of the forms; what to say of it."""
    if form == "delta":
        seen = export_delta(folder, out, base, overwrite)
        share = seen["bytes"] / seen["twin_bytes"]
        return f"{seen['bytes']:,} bytes, {share:.2%} of the twin; applied to the original it gives every bit of it"
    if form == "onnx":
        from surgery.export_onnx import export_onnx

        seen = export_onnx(folder, out, base, overwrite)
        return (
            f"ONNX graph, differs by {seen['difference']:.1e} in onnxruntime; operators {', '.join(seen['operators'])}"
        )
    seen = export_silu(folder, out, overwrite) if form == "silu" else export_full(folder, out, base, overwrite)
    return f"{form} form, reloaded in a fresh process, difference {seen['difference']:.1e}"


def _probe(model: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(2 * 16, device=model.device).view(2, 16) % model.config.vocab_size}
