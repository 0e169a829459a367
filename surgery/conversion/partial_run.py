"""Finished blocks of an interrupted conversion, kept beside the output until it is complete."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery.blocks.block import Block
from surgery.calibration.inputs import Calibration
from surgery.closed_form.moments import GaussianMixture
from surgery.conversion.recipe import Recipe
from surgery.errors import CheckpointError
from surgery.models import fingerprint
from surgery.models.loading import LoadedModel
from surgery.models.saved_blocks import saved_block
from surgery.runtime.files import as_os_error, not_written, replacing, write_json
from surgery.saving.folder import kept_beside
from surgery.version import __version__

SAMPLES, MERGED = "samples.safetensors", "merged"


def partial_folder(target: Path) -> Path:
    """Where an interrupted conversion to `target` keeps what is finished."""
    return kept_beside(target, "partial")


def merged_folder(target: Path) -> Path:
    """Where weights are kept that were put together on loading and are to stay on disk."""
    return partial_folder(target) / MERGED


def model_identity(loaded: LoadedModel, name: str, given: Mapping[str, GaussianMixture]) -> str:
    """What tells one model's results from another's of the same name; and from those for other `given` moments.

    The Hub's revision, or sizes and times of a checkpoint's files, or, of a model in memory, its tensors.
    """
    about = f"{__version__} {loaded.source.as_dict()}"
    tensors = {f"{path} {n}": part for path, moments in given.items() for n, part in enumerate(moments.parts())}
    if loaded.source.kind == "memory":
        tensors |= loaded.model.state_dict()
    elif loaded.source.kind != "hub":
        place = Path(name).expanduser()
        inside = place.iterdir() if place.is_dir() else [place]
        for file in sorted(file for file in inside if file.is_file()):  # the output's folder may be in there too
            seen = file.stat()
            about += f" {file.name} {seen.st_size} {seen.st_mtime_ns}"
    return fingerprint.of_tensors(tensors, about)


def kept_samples(
    target: Path | None, model: str, settings: Mapping[str, Any], draw: Callable[[], Calibration]
) -> Calibration:
    """The model's own samples: those of an interrupted run with the same settings, else new ones, which are kept."""
    if target is None:
        return draw()
    key = hashlib.sha256(json.dumps([model, dict(settings)], sort_keys=True).encode()).hexdigest()
    file = partial_folder(target) / SAMPLES
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            known = opened.metadata()
        if known.get("key") == key:
            return Calibration.of_tensors(load_file(file), json.loads(known["calibration"]))
    data = draw()
    try:
        with replacing(file) as temporary:
            save_file(data.as_tensors(), temporary, metadata={"key": key, "calibration": json.dumps(data.as_dict())})
    except Exception as error:
        raise not_written(as_os_error(error), "the samples could not be kept", file.parent) from error
    return data


@dataclass(frozen=True)
class PartialRun:
    """`OUT.partial/`: a file per finished block, valid for one recipe, model and calibration only."""

    folder: Path | None

    @staticmethod
    def open(target: Path | None, recipe: Recipe, model: str, data: Calibration) -> PartialRun:
        """Of the model with that :func:`model_identity`. Raises CheckpointError if the folder is of another run."""
        if target is None:
            return PartialRun(None)
        folder = partial_folder(target)
        elsewhere = ("output", "measure", "save_dtype", "device")  # change nothing in a block
        ours = {key: value for key, value in recipe.resolved().items() if key not in elsewhere}
        text = json.dumps([ours, model, data.fingerprint], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        note = folder / "run.json"
        here = {file.name for file in folder.iterdir() if file.name[0] != "."} if folder.exists() else set()
        if here - {SAMPLES, MERGED}:
            known = json.loads(note.read_text())["key"] if note.is_file() else None
            if known != key:
                raise CheckpointError(
                    "an interrupted run of another model, or with other settings, left its finished blocks here",
                    where=str(folder),
                    fix="repeat the earlier command to finish it, or give --restart to discard them",
                )
        write_json(note, {"key": key, "recipe": ours})
        return PartialRun(folder)

    def _file(self, block: Block) -> Path:
        assert self.folder is not None
        return self.folder / f"{block.path}.safetensors"

    def finished(self, blocks: Sequence[Block]) -> frozenset[str]:
        """Paths of the blocks whose results are here: always the first few, since each depends on those before."""
        done = []
        for block in blocks:
            if self.folder is None or not self._file(block).is_file():
                break
            done.append(block.path)
        return frozenset(done)

    def keep(self, block: Block, entry: dict[str, Any], row: dict[str, Any], modules: dict[str, nn.Module]) -> None:
        """Writes a finished block: its entry in the configuration, its row in the report, its modules by path.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.folder is None:
            return
        tensors = {
            f"{path}:{name}": value.contiguous()
            for path, module in modules.items()
            for name, value in module.state_dict().items()
        }
        try:
            with replacing(self._file(block)) as temporary:
                save_file(tensors, temporary, metadata={"entry": json.dumps(entry), "row": json.dumps(row)})
        except Exception as error:
            what = "a finished block could not be kept (those before it are not redone)"
            raise not_written(as_os_error(error), what, self.folder) from error

    def load(self, block: Block, like: Tensor) -> tuple[dict[str, Any], dict[str, Any], dict[str, nn.Module]]:
        """What :meth:`keep` was given for a block, with the modules' dtype and device as `like`."""
        with safe_open(self._file(block), framework="pt") as file:
            metadata = file.metadata()
        entry, row = json.loads(metadata["entry"]), json.loads(metadata["row"])
        tensors = load_file(self._file(block))
        modules = saved_block(entry).empty()
        for path, module in modules.items():
            own = {key.split(":", 1)[1]: value for key, value in tensors.items() if key.split(":", 1)[0] == path}
            module.to_empty(device=like.device).to(like.dtype).load_state_dict(own)
            module.train(False)
        return entry, row, modules

    def note(self, name: str, value: Any) -> None:
        """Keeps a result that is no block, in JSON."""
        if self.folder is not None:
            write_json(self.folder / f"{name}.json", value)

    def noted(self, name: str) -> Any:
        """What an interrupted run kept under this name; None where nothing is."""
        file = None if self.folder is None else self.folder / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None

    def close(self) -> None:
        """Removes it all, since the twin is whole."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
