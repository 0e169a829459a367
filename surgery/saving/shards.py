"""Models larger than memory: weights stay on disk, and each is read when it is used.

The model is loaded with all its weights on disk (accelerate's hooks read them from the safetensors files, module by
module). Calibration passes wait at one block after another, so at any time a few matrices, the block's own weights and
the passes' hidden states are in memory. A finished block is kept in `OUT.partial/` and leaves memory once all passes
are beyond it. The checkpoint is then put together shard by shard from those files and the original's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgery.errors import CheckpointError, ModelError
from surgery.models import modeling_polynomial
from surgery.models.companions import Companions
from surgery.models.loading import Source
from surgery.runtime.files import replacing, write_json

INDEX = "model.safetensors.index.json"
StoredTensor = tuple[Path, str]
"""A safetensors file, and the name of a tensor in it."""


def stored_tensors(model: Any, source: Source) -> dict[str, StoredTensor]:
    """Where each of the model's tensors is on disk: in the original's files, whatever its name there, or, put together
    on loading (experts), in a file of its own.

    Raises:
        ModelError: not a checkpoint's, or a tensor is nowhere.
    """
    if source.kind not in ("folder", "hub"):
        raise ModelError("only a checkpoint in a folder can stay on disk", where=source.name, cause=source.kind)
    found: dict[str, StoredTensor] = {}
    for module in model.modules():
        known = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for name, entry in getattr(getattr(known, "dataset", None), "index", {}).items():
            found[name] = Path(entry["safetensors_file"]), entry["weight_name"]
    tied = {name: of for name, of in (getattr(model, "all_tied_weights_keys", None) or {}).items() if of in found}
    for name in model.state_dict():
        if name not in found and name not in tied:
            raise ModelError(
                f"{name} is not in the checkpoint's files",
                where=source.name,
                cause="this architecture makes it on loading",
                fix="convert it in memory, without --offload",
            )
    return {name: place for name, place in found.items() if name not in tied}


def write_shards(
    model: Any,
    blocks: Path,
    originals: Mapping[str, StoredTensor],
    tokenizer: Any,
    companions: Companions,
    folder: Path,
    dtype: str,
) -> None:
    """The twin's checkpoint, one shard in memory at a time. Shards that an interrupted run finished are not redone.

    Args:
        model: the twin's structure; its weights are not looked at.
        blocks: folder of the finished blocks' files.
        originals: see :func:`stored_tensors`.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    wanted = getattr(torch, dtype)
    sources = _sources(blocks, originals)
    planned = {}
    for name, value in model.state_dict().items():
        if name in sources:
            kind = wanted if value.is_floating_point() else value.dtype
            planned[name] = torch.empty(value.shape, dtype=kind, device="meta")
    plan = split_torch_state_dict_into_shards(planned, max_shard_size=SHARD)
    place = blocks / "shards"
    place.mkdir(exist_ok=True)
    for file, names in plan.filename_to_tensors.items():
        if (place / file).is_file():
            continue
        tensors = {name: _read(*sources[name], like=planned[name]) for name in names}
        with replacing(place / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    for file in plan.filename_to_tensors:
        os.replace(place / file, folder / file)
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    model.config.dtype = wanted
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if isinstance(model, modeling_polynomial.PolynomialModel):
        shutil.copy(modeling_polynomial.__file__, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    companions.write(folder)


def _sources(blocks: Path, originals: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """File and key of every tensor; what a finished block holds stands before the original's."""
    found = dict(originals)
    for part in blocks.glob("*.safetensors"):
        with safe_open(part, framework="pt") as file:
            found |= {key.replace(":", "."): (part, key) for key in file.keys() if ":" in key}  # noqa: SIM118
    return found


def _read(file: Path, key: str, like: Tensor) -> Tensor:
    """A tensor in the precision of `like`; smaller ones (a block with fewer units than others) are filled with 0."""
    with safe_open(file, framework="pt") as opened:
        value: Tensor = opened.get_tensor(key)
    if any(have > room for have, room in zip(value.shape, like.shape, strict=True)):
        raise CheckpointError(f"{key} is larger than its place", where=file.name)
    if value.shape == like.shape:
        return value.to(like.dtype)
    result = torch.zeros(like.shape, dtype=like.dtype)
    result[tuple(slice(0, size) for size in value.shape)] = value.to(like.dtype)
    return result


SHARD = "500MB"  # of a checkpoint put together from files: what is in memory at once
