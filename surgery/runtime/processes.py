"""Several processes that work together: each runs its own part of the batches or documents, and what is summed over
tokens is summed once more over processes. Alone, every function here gives back what it was given.

The processes are those of `torch.distributed`, started by accelerate, torchrun or `--nproc`. Whoever shares work calls
:func:`join` first; it may be called again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from surgery.errors import SurgeryError

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # the others wait while one draws samples or writes a twin


def join() -> None:
    """Joins the group that a launcher started, if one did and this process has not. Uses CUDA, or gloo on CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _together():
        return
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    PartialState(cpu=on_cpu, timeout=PATIENCE)


def leave() -> None:
    """Leaves the group, at the end of what went well.

    After an error nobody should: leaving may wait for the others, who would not learn that this process has ended.
    """
    if _together():
        dist.destroy_process_group()


def accelerator() -> Any:
    """accelerate's view of the group."""
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """How many processes work together."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """This one's number among them, from 0."""
    return dist.get_rank() if _together() else 0


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def own_part(items: Sequence[T]) -> tuple[int, Sequence[T]]:
    """This process's part of the items, in one piece, and the number of its first."""
    begin, end = (len(items) * at // count() for at in (rank(), rank() + 1))
    return begin, items[begin:end]


def own_rows(rows: Tensor) -> Tensor:
    """This process's part of a tensor's rows, in one piece."""
    begin, own = own_part(range(len(rows)))
    return rows[begin : begin + len(own)]


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


def looked_up(find: Callable[[], T]) -> T:
    """What the first process finds, on all: the others do not look. A SurgeryError of the first is raised by all."""
    found, error = None, None
    if first():
        try:
            found = find()
        except SurgeryError as wrong:
            error = wrong
    found, error = from_first((found, error))
    if error is not None:
        raise error
    return cast(T, found)


def gather(value: T) -> list[T]:
    """Every process's value, in order of rank, on all."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def gather_to_first(value: T) -> list[T] | None:
    """Every process's value, in order of rank, on the first; None on the others."""
    if count() == 1:
        return [value]
    found: list[Any] | None = [None] * count() if first() else None
    dist.gather_object(value, found)
    return found
