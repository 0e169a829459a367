"""What tells one model's weights from another's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def of_tensors(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """SHA-256 of names, kinds, shapes and values of tensors, and of what else is given.

    Tensors that are on the meta device are left out.
    """
    digest = hashlib.sha256(more.encode())
    for name, value in sorted(tensors.items()):
        if not value.is_meta:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
