"""bfloat16 where the processor multiplies it faster than float32, over weights that stay as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def fast_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, matrices are multiplied in bfloat16 where that is faster on this device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_bf16(device))


def fast_bf16(device: torch.device) -> bool:
    """Whether the processor has instructions for it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    look = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and look is not None and bool(look())
