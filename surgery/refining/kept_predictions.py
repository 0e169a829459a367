"""What the original predicts for the training windows, on disk, for windows that come again.

Of every position the K most likely words are kept and how probable all others are together, P, which lies over them as
the twin has it there, Q. KL(p ‖ q) with p known but for how its rest is spread is

    Σ_K p (log p − log q) + P log(P ÷ Q)

(a lower bound of the whole divergence, with no gradient that spreads the rest otherwise).
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from surgery.refining.packing import PackedWindows
from surgery.runtime.files import not_written

WORD, LOGARITHM = np.dtype(np.int32), np.dtype(np.float16)
SMALLEST = -6e4  # logarithm that float16 holds
TOGETHER = 4096  # windows that are told apart at once
ZEROS = 2**24  # bytes written at once


class Likeliest(NamedTuple):
    """The K most likely words of every position, (…, K), their log-probabilities, and that of all others, (…, 1)."""

    words: Tensor
    log_p: Tensor
    log_rest: Tensor

    @staticmethod
    def of(logits: Tensor, count: int, temperature: float) -> Likeliest:
        """Of softmax(logits ÷ T), (windows, length, vocabulary); float32."""
        windows = []
        for window in logits:  # a float32 copy of one at a time
            scaled = window.float() / temperature
            normaliser = scaled.logsumexp(-1, keepdim=True)
            values, words = scaled.topk(count, sorted=False)
            windows.append((words, values - normaliser, _without(scaled, words) - normaliser))
        return Likeliest(*(torch.stack(parts) for parts in zip(*windows, strict=True)))

    def to(self, device: torch.device) -> Likeliest:
        return Likeliest(*(part.to(device) for part in self))

    def completed(self, found: Tensor, temperature: float) -> Tensor:
        """Logits of the same predictions, the rest as in `found`, float32; (windows, length, vocabulary) both."""
        logits = found.detach().float() / temperature
        for window, words, log_rest in zip(logits, self.words, self.log_rest, strict=True):
            window.add_(log_rest - _without(window, words))
        logits.scatter_(-1, self.words, self.log_p)
        return logits.mul_(temperature)


class KeptPredictions:
    """The likeliest words of the windows that were seen, in two files.

    The files stand beside the state of the run and are found again after a kill, so that windows have the same
    predictions as without one. A position whose word is 0 was not written: words are counted from 1.

    Args:
        place: folder of the run's state.
        name: of the run, which no other has: its settings and windows.
        windows: all of them; those that are equal are kept once.
        count: K.
        temperature: T of the softmax.
    """

    def __init__(self, place: Path, name: str, windows: PackedWindows, count: int, temperature: float = 1.0) -> None:
        self.place, self.name, self.count, self.temperature = place, name, count, temperature
        self.slot = _slots(windows)
        self.distinct, self.length = int(self.slot.max()) + 1, windows.ids.shape[1]
        self.files: tuple[Any, Any] | None = None

    def __call__(self, numbers: Tensor, logits: Callable[[], Tensor]) -> Likeliest:
        """Of the windows with these numbers; where one is new, `logits()`, (windows, length, vocabulary), gives all.

        Raises:
            CheckpointError: the disk has no room for them.
        """
        if self.files is None:  # not before the run is known to be the one that left them
            shape = self.distinct, self.length
            self.files = (
                _on_disk(self.place / f"words-{self.name}", WORD, (*shape, self.count)),
                _on_disk(self.place / f"predictions-{self.name}", LOGARITHM, (*shape, self.count + 1)),
            )
        kept, logarithms = self.files
        slots = self.slot[numbers.numpy()]
        new = ~(kept[slots] > 0).all((1, 2))
        if new.any():  # what is there stays, so that predictions do not hang on what a window came with last
            found = Likeliest.of(logits(), self.count, self.temperature)
            both = torch.cat([found.log_p, found.log_rest], -1).clamp_min(SMALLEST)
            logarithms[slots[new]] = both.cpu().numpy()[new].astype(LOGARITHM)
            kept[slots[new]] = found.words.cpu().numpy()[new] + 1
        words, both = torch.from_numpy(kept[slots]).long() - 1, torch.from_numpy(logarithms[slots]).float()
        return Likeliest(words, both[..., :-1], both[..., -1:])


def bytes_kept(tokens: int, count: int) -> int:
    """Of the predictions for so many tokens, at most."""
    return tokens * (WORD.itemsize * count + LOGARITHM.itemsize * (count + 1)) if count else 0


def _without(logits: Tensor, words: Tensor) -> Tensor:
    """log Σ exp(logits) over the other words, (…, 1): as a difference it would be rounding where they are few."""
    return logits.scatter(-1, words, -math.inf).logsumexp(-1, keepdim=True)


def _slots(windows: PackedWindows) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A number for every window, the same for equal ones, from 0 on."""
    width = windows.ids.shape[1]
    factors = np.random.default_rng(0).integers(1, 2**63, (2, width), dtype=np.uint64) | np.uint64(1)
    sums = []
    for part in windows.split(TOGETHER):
        parts = (part.ids,) if part.positions is None else (part.ids, part.positions)
        sums.append(sum((one.numpy().astype(np.uint64) * by).sum(-1) for one, by in zip(parts, factors, strict=False)))
    return np.unique(np.concatenate(sums), return_inverse=True)[1]


def _on_disk(file: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """An array in a file, which is zero where the file is new."""
    size = math.prod(shape) * kind.itemsize
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _reserve(file, size)
        return np.memmap(file, kind, "r+", shape=shape)
    except OSError as error:
        what = f"{size / 2**20:,.0f} MiB of the original's predictions cannot be kept"
        raise not_written(error, what, file.parent) from error


def _reserve(file: Path, size: int) -> None:
    """Zeros up to this size, with room for them on the disk: a map of a file cannot say later that there is none."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        there = os.fstat(handle).st_size
        if there >= size:
            return
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle, there, size - there)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        os.lseek(handle, there, os.SEEK_SET)
        while there < size:
            there += os.write(handle, bytes(min(ZEROS, size - there)))
    finally:
        os.close(handle)
