"""Models larger than memory: weights stay on disk, and each is read when it is used.

The model is loaded with all its weights on disk (accelerate's hooks read them from the safetensors files, module by
module). Calibration passes wait at one block after another, so at any time a few matrices, the block's own weights and
the passes' hidden states are in memory. A finished block is kept in `OUT.partial/` and leaves memory once all passes
are beyond it. The checkpoint is then put together shard by shard from those files and the original's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.blocks import Block
from surgery.checkpoint import SHARD, write_json
from surgery.errors import CheckpointError, ModelError
from surgery.loading import Source
from surgery.modeling_polynomial import PolynomialModel

ON_DISK = {"": "disk"}
INDEX = "model.safetensors.index.json"


def device_of(model: Any) -> torch.device:
    """Where the model computes: where its weights are, or, with weights on disk, where they are read to."""
    if model.device.type != "meta":
        device: torch.device = model.device
        return device
    given = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if given is None else given)


@contextmanager
def in_memory(modules: Iterable[Any]) -> Iterator[None]:
    """Inside, the modules' weights are there."""
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.Module) and any(p.is_meta for p in module.parameters()):
                stack.enter_context(align_module_device(module, getattr(module._hf_hook, "execution_device", "cpu")))
        yield


def original_files(folder: Path) -> dict[str, Path]:
    """Which file of a checkpoint folder holds each tensor. Raises ModelError where it is not in safetensors."""
    if (folder / INDEX).is_file():
        names: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ModelError(
            "the checkpoint is not in safetensors",
            where=folder.name,
            fix="save it as safetensors first, or convert it in memory",
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def folder_of(source: Source, name: str) -> Path:
    """Where a model's files are. Raises ModelError for what is no checkpoint of its own."""
    if source.kind not in ("folder", "hub"):
        raise ModelError("only a checkpoint in safetensors can stay on disk", where=source.name, cause=source.kind)
    if source.kind == "folder":
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=source.revision, allow_patterns=["*.safetensors", "*.json"]))


def check_names(model: Any, folder: Path, blocks: Sequence[Block]) -> dict[str, Path]:
    """The files of all tensors outside the blocks, under their names in memory.

    Raises:
        ModelError: a tensor has another name on disk, so that it cannot be copied as it is.
    """
    files = original_files(folder)
    inside = tuple(f"{block.path}." for block in blocks)
    for block in blocks:
        if block.kind == "experts":
            raise ModelError(
                "experts cannot stay on disk",
                where=block.path,
                cause="a checkpoint keeps each by itself, and the model all in one",
                fix="convert it in memory, without --offload",
            )
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in model.state_dict():
        if name not in files and name not in tied and not name.startswith(inside):
            raise ModelError(
                f"{name} has another name in the checkpoint",
                where=folder.name,
                cause="this architecture's weights are renamed or put together on loading",
                fix="convert it in memory, without --offload",
            )
    return files


def write(model: Any, blocks: Path, originals: Mapping[str, Path], tokenizer: Any, folder: Path, dtype: str) -> None:
    """The twin's checkpoint, one shard in memory at a time. Shards that an interrupted run finished are not redone.

    Args:
        model: the twin's structure; its weights are not looked at.
        blocks: folder of the finished blocks' files.
        originals: see :func:`check_names`.
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
        save_file(tensors, place / "shard.tmp", metadata={"format": "pt"})
        os.replace(place / "shard.tmp", place / file)
    for file in plan.filename_to_tensors:
        os.replace(place / file, folder / file)
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    model.config.dtype = wanted
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if isinstance(model, PolynomialModel):
        shutil.copy(Path(__file__).with_name("modeling_polynomial.py"), folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _sources(blocks: Path, originals: Mapping[str, Path]) -> dict[str, tuple[Path, str]]:
    """File and key of every tensor; what a finished block holds stands before the original's."""
    found = {name: (file, name) for name, file in originals.items()}
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
