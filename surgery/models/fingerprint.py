"""What tells one model's weights from another's, without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

SOME = 4096  # elements of a tensor that tell it from another


def of_tensors(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """SHA-256 of names, kinds, shapes and some elements of tensors, and of what else is given.

    Tensors that are on the meta device are left out.
    """
    digest = hashlib.sha256(more.encode())
    for name, value in sorted(tensors.items()):
        if not value.is_meta:
            some = value.detach().flatten()[:: max(1, value.numel() // SOME)].cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
