"""Several processes that work together: each runs its own part of the batches or documents, and what is summed over
tokens is summed once more over processes. Alone, every function here gives back what it was given.

The processes are those of `torch.distributed`, started by accelerate, torchrun or `--nproc`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process belongs to the group that a launcher started; it leaves only a group that it joined here.

    On an error it stays: the others would take its leaving for an error of their own, and tell that one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _together():
        yield
        return
    joining = accelerator()
    yield
    joining.end_training()


def accelerator() -> Any:
    """accelerate's view of the group, on CUDA or on CPU (gloo)."""
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    return dist.get_rank() if _together() else 0


def first() -> bool:
    """Whether this process is the one that writes and prints; known from the launcher, joined or not."""
    return (dist.get_rank() if _together() else int(os.environ.get("RANK", "0"))) == 0


def own_part(items: Sequence[T]) -> tuple[int, Sequence[T]]:
    """This process's part of the items (or of a tensor's rows), in one piece, and the number of its first."""
    begin, end = (len(items) * at // count() for at in (rank(), rank() + 1))
    return begin, items[begin:end]


def total(value: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if count() > 1:
        dist.all_reduce(value)
    return value


def sum_number(value: float) -> float:
    """The sum over all processes of a number."""
    return sum(gather(value))


def together(rows: Tensor) -> Tensor:
    """The rows of all processes, in order of rank; they may be of different number."""
    if count() == 1:
        return rows
    return torch.cat(gather(rows.cpu())).to(rows.device)


def from_first(value: T) -> T:
    """The first process's value, on all."""
    if count() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    agreed: T = box[0]
    return agreed


def gather(value: T) -> list[T]:
    """Every process's value, in order of rank, on all."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found
