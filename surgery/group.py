"""Several processes that calibrate together: each runs its own batches, and what is summed over tokens is summed once
more over processes. Alone, every function here gives back what it was given.

The processes are those of `torch.distributed`, started by accelerate, torchrun or `surgery convert --nproc`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def mine(items: Sequence[T]) -> tuple[int, Sequence[T]]:
    """This process's part of the items, in one piece, and the number of its first."""
    begin, end = (len(items) * at // count() for at in (rank(), rank() + 1))
    return begin, items[begin:end]


def total(value: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if count() > 1:
        dist.all_reduce(value)
    return value


def number(value: float) -> float:
    """The sum over all processes of a number."""
    return sum(each(value))


def together(rows: Tensor) -> Tensor:
    """The rows of all processes, in order of rank; they may be of different number."""
    if count() == 1:
        return rows
    return torch.cat(each(rows.cpu())).to(rows.device)


def agreed(value: T) -> T:
    """The first process's value, on all."""
    if count() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    agreed_value: T = box[0]
    return agreed_value


def each(value: T) -> list[T]:
    """Every process's value, in order of rank."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found
