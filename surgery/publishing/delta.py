"""A twin as what it adds to its original, and from that back to the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from surgery.errors import ModelError
from surgery.models import delta, loading
from surgery.runtime.files import write_json
from surgery.saving.checkpoint import save
from surgery.saving.folder import check_target, whole_folder
from surgery.saving.reload import probe_ids
from surgery.saving.report import read_verified_report, write_report


def export_delta(folder: Path, out: Path, original: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Saves what a twin adds to its original, verified bit by bit; sizes in bytes of the delta and of the twin.

    Args:
        original: Hub id, folder or .gguf; by default as the twin's report names it.
    """
    report = read_verified_report(folder)
    out = check_target(out, overwrite)
    source = report["source"]
    if original is None and source["kind"] != "hub":
        raise ModelError(
            f"the twin was made from {source['name']!r}, which is not on the Hub",
            where=str(folder),
            fix="name the original with --original",
        )
    twin = loading.loaded(str(folder), dtype="auto")
    stored = twin.source.dtype
    base = loading.loaded(original or source["name"], None if original else source["revision"], stored)
    network: Any = twin.model
    found = delta.difference(network, base.model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    origin = {"base": base.source.name, "kind": base.source.kind, "revision": base.source.revision}
    weights = {"sha256": delta.weights_sha256(base.model), "dtype": stored, "derived": found.derived}
    config[delta.KEY] = {"format": delta.FORMAT, **origin, **weights}
    with whole_folder(out) as place:
        save_file(found.tensors, place / delta.WEIGHTS)
        write_json(place / "config.json", config)
        shutil.copy(folder / "modeling_polynomial.py", place)
        again: Any = loading.loaded(str(place), dtype="auto", base=original).model
        ours, theirs = network.state_dict(), again.state_dict()
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            raise ModelError("the delta does not give the twin back", where=str(folder))
        seen = {"verified": True, "form": "delta", "difference": 0.0}
        write_report(place, {**report, "form": "delta", "exported_from": folder.name}, seen)
    whole = sum(value.numel() * value.element_size() for value in network.parameters())
    return {**seen, "bytes": found.size, "twin_bytes": whole}


def export_full(folder: Path, out: Path, original: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Saves the whole twin a delta stands for, verified in a fresh process; what the verification saw."""
    report = read_verified_report(folder)
    if report["form"] != "delta":
        raise ModelError("not a delta", where=str(folder), cause="it is a whole twin already")
    out = check_target(out, overwrite)
    loaded = loading.loaded(str(folder), dtype="auto", base=original)
    probe = probe_ids(loaded.model)
    described = {key: value for key, value in report.items() if key != "exported_from"} | {"form": "custom"}
    how: dict[str, Any] = {"dtype": loaded.source.dtype, "companions": loaded.companions}
    return save(loaded.model, loaded.tokenizer, out, described, probe, **how)
