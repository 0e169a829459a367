"""Weights and hidden states on disk while a model runs.

With `device_map=ON_DISK`, accelerate's hooks read each module's weights from safetensors files when it is called, and
let them go afterwards.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
def in_memory(modules: Iterable[Any]) -> Iterator[None]:
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
    """Inside, a forward pass that finds a weight still on disk is a ModelError: DBRX uses matrices of modules that it
    does not call, so that nothing reads them."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        raise ModelError(
            "this architecture's weights cannot stay on disk",
            where=name,
            cause="it uses weights of a part that it does not call",
            fix="convert it in memory, without --offload",
        ) from error


def in_file(tensor: Tensor, folder: Path) -> None:
    """Moves a tensor's memory, in place, to a file without a name, which lives as long as the tensor does."""
    if tensor.device.type != "cpu" or tensor.untyped_storage().filename is not None:
        return
    descriptor, name = tempfile.mkstemp(dir=folder, suffix=".hidden")
    os.close(descriptor)
    mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    os.unlink(name)
    tensor.data = mapped.copy_(tensor)
