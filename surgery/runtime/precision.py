"""bfloat16 where the processor multiplies it faster than float32, over weights that stay as they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

MATMUL = ("auto", "float32", "bfloat16")
FASTER = 1.4  # times as fast, to be worth its rounding
SIDE, ROUNDS = 512, 4


def autocast(dtype: str, device: torch.device, cached: bool = False) -> AbstractContextManager[Any]:
    """Inside, float32 matrices are multiplied in `dtype`, one of :data:`MATMUL`; weights stay as they are.

    Args:
        cached: keep each weight's rounded copy until the end, for those that are used many times.
    """
    rounded = chosen_dtype(dtype, device) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=rounded, cache_enabled=cached)


def multiplied_in(dtype: str, x: torch.Tensor) -> AbstractContextManager[Any]:
    """Inside, `x` is multiplied in `dtype` if it is float32; any other precision is its own."""
    return autocast(dtype if x.dtype == torch.float32 else "float32", x.device)


def chosen_dtype(dtype: str, device: torch.device) -> str:
    """`auto` spelled out: bfloat16 where this device multiplies it faster than float32."""
    return dtype if dtype != "auto" else "bfloat16" if fast_bf16(device) else "float32"


def usable_dtype(dtype: str, device: torch.device, run: Callable[[], Any]) -> str:
    """`auto` spelled out for a model: bfloat16 where the device multiplies it faster and `run` goes through so."""
    if dtype == "auto" and fast_bf16(device):
        return "bfloat16" if runs_in_bfloat16(device, run) else "float32"
    return chosen_dtype(dtype, device)


def runs_in_bfloat16(device: torch.device, run: Callable[[], Any]) -> bool:
    """Whether a forward pass does: some models add what was rounded to what was not, which torch refuses."""
    try:
        with torch.no_grad(), autocast("bfloat16", device):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


@cache
def fast_bf16(device: torch.device) -> bool:
    """Whether it is multiplied faster: a GPU is asked, a CPU multiplies one matrix both ways."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and FASTER * _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """Of one product of two matrices on the CPU, the least of a few."""
    one = torch.ones(SIDE, SIDE, dtype=dtype)
    taken = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        one @ one
        taken.append(time.perf_counter() - begun)
    return min(taken)
