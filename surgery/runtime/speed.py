"""How fast this machine multiplies matrices, by one product of two."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch

from surgery.runtime.precision import chosen_dtype

SIDE, MOMENT = 1024, 0.2  # of the matrices, and seconds to multiply them for
REACHED = 0.6  # of that speed, by a model


@dataclass(frozen=True)
class Speed:
    """Operations a second that a model reaches, additions and multiplications counted one by one.

    Attributes:
        products: in what `matmul` says, where `auto` is what is faster.
        exact, double: in float32 and in float64.
    """

    products: float
    exact: float
    double: float

    @staticmethod
    @cache
    def of(device: torch.device, matmul: str = "auto") -> Speed:
        """Of this device, measured within a second."""
        exact = machine_speed(device, torch.float32)
        faster = chosen_dtype(matmul, device) == "bfloat16"
        products = machine_speed(device, torch.bfloat16) if faster else exact
        double = machine_speed(device, torch.float64) if device.type != "mps" else exact / 2
        return Speed(products * REACHED, exact * REACHED, double * REACHED)


def machine_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one matrix product."""
    one = torch.randn(SIDE, SIDE, device=device).to(dtype)
    one @ one
    begun, count = time.monotonic(), 0
    while time.monotonic() - begun < MOMENT:
        float((one @ one)[0, 0])  # waits for the device
        count += 1
    return count * 2 * SIDE**3 / (time.monotonic() - begun)
