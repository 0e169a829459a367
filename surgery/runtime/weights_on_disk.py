"""Weights and hidden states on disk while a model runs.

With `device_map=ON_DISK`, accelerate's hooks read each module's weights from safetensors files when it is called, and
let them go afterwards.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from surgery.errors import ModelError

ON_DISK = {"": "disk"}


def device_of(model: Any) -> torch.device:
    """Where the model computes: where its weights are, or, with weights on disk, where they are read to."""
    if model.device.type != "meta":
        device: torch.device = model.device
        return device
    given = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if given is None else given)


@contextmanager
def weights_present(modules: Iterable[Any]) -> Iterator[None]:
    """Inside, the modules' weights are there, those of their parts too."""
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for module in modules:
            for part in module.modules() if isinstance(module, nn.Module) else ():
                if any(p.is_meta for p in part.parameters(recurse=False)):
                    where = getattr(part._hf_hook, "execution_device", "cpu")
                    stack.enter_context(align_module_device(part, where))
        yield


@contextmanager
def read_when_used(name: str) -> Iterator[None]:
    """Inside, a weight used while it is on disk is a ModelError: DBRX and LongCat use matrices of modules that they do
    not call, so that nothing reads them. Some of PyTorch's functions raise then, others compute from whatever is there.
    """
    refused = ModelError(
        "this architecture's weights cannot stay on disk",
        where=name,
        cause="it uses weights of a part that it does not call",
        fix="convert it in memory, without --offload",
    )
    try:
        with _Unmixed(refused):
            yield
    except NotImplementedError as error:
        if "meta tensor" not in str(error):
            raise
        raise refused from error


class _Unmixed(TorchDispatchMode):
    """Inside, raises where a function is given tensors with values and tensors without."""

    def __init__(self, error: Exception) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.error = error

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor) and part.dim() > 0]
        if len({part.is_meta for part in given}) > 1:
            raise self.error
        return func(*args, **(kwargs or {}))


def in_file(tensor: Tensor, folder: Path) -> None:
    """Moves a tensor's memory, in place, to a file without a name, which lives as long as the tensor does."""
    if tensor.device.type != "cpu" or tensor.untyped_storage().filename is not None:
        return
    descriptor, name = tempfile.mkstemp(dir=folder, suffix=".hidden")
    os.close(descriptor)
    mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    os.unlink(name)
    tensor.data = mapped.copy_(tensor)


def fresh_folder(folder: Path | None) -> Path:
    """A new folder in this one: a model that is gone, but not collected yet, removes its own only."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder))


def remove_folders(folders: Sequence[Path]) -> None:
    """The first folder, and those it is in that are empty then."""
    if folders:
        shutil.rmtree(folders[0], ignore_errors=True)
    with suppress(OSError):
        for empty in folders[1:]:
            empty.rmdir()
