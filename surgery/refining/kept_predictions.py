"""What the original predicts for the training windows, on disk, for windows that come again.

Of every position the K most likely words are kept, 6 bytes each. The rest of the probability is one number, which lies
over the other words as the twin has it there: KL(p ‖ q) with p known but for how its rest is spread is

    Σ_K p (log p − log q) + P log(P ÷ Q),    P = 1 − Σ_K p,  Q = 1 − Σ_K q

(a lower bound of the whole divergence, with no gradient that spreads the rest otherwise).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from surgery.refining.packing import PackedWindows
from surgery.runtime.files import not_written

BYTES = np.dtype(np.int32).itemsize + np.dtype(np.float16).itemsize  # of a word and its log-probability
LEAST = 1e-12  # of the rest's probability: none would be a logarithm of nothing
TOGETHER = 4096  # windows that are told apart at once


class Likeliest(NamedTuple):
    """The K most likely words of every position, (…, K), and their log-probabilities, float32."""

    words: Tensor
    log_p: Tensor

    @staticmethod
    def of(logits: Tensor, count: int, temperature: float) -> Likeliest:
        """Of softmax(logits ÷ T), (…, vocabulary)."""
        values, words = logits.topk(min(count, logits.shape[-1]), sorted=False)
        normaliser = _normaliser(row.float() / temperature for row in logits)
        return Likeliest(words, values.float() / temperature - normaliser)

    def to(self, device: torch.device) -> Likeliest:
        return Likeliest(self.words.to(device), self.log_p.to(device))

    def completed(self, found: Tensor, temperature: float) -> Tensor:
        """Logits of the same predictions, the rest as in `found`, float32; (…, vocabulary) both."""
        logits = found.detach().float() / temperature
        normaliser = _normaliser(logits)
        q, p = (logits.gather(-1, self.words) - normaliser).exp(), self.log_p.exp()
        rest_q, rest_p = (1 - part.sum(-1, keepdim=True) for part in (q, p))
        logits += rest_p.clamp_min(LEAST).log() - rest_q.clamp_min(LEAST).log()
        logits.scatter_(-1, self.words, self.log_p + normaliser)
        return logits.mul_(temperature)


class KeptPredictions:
    """The likeliest words of the windows that were seen, in two files.

    The files stand beside the state of the run and are found again after a kill, so that windows have the same
    predictions as without one. A position whose word is 0 was not written: words are counted from 1.

    Args:
        place: folder of the run's state.
        name: of the run, which no other has: its settings, windows and process.
        windows: all of them; those that are equal are kept once.
        count: K.
        temperature: T of the softmax.
    Raises:
        CheckpointError: the disk has no room for them.
    """

    def __init__(self, place: Path, name: str, windows: PackedWindows, count: int, temperature: float = 1.0) -> None:
        self.count, self.temperature = count, temperature
        self.slot = _slots(windows)
        self.distinct = int(self.slot.max()) + 1
        shape = self.distinct, windows.ids.shape[1], count
        place.mkdir(parents=True, exist_ok=True)
        self.words = _on_disk(place / f"words-{name}", np.int32, shape)
        self.log_p = _on_disk(place / f"predictions-{name}", np.float16, shape)

    def __call__(self, numbers: Tensor, logits: Callable[[], Tensor]) -> Likeliest:
        """Of the windows with these numbers; where one is new, `logits()`, (windows, length, vocabulary), gives all."""
        slots = self.slot[numbers]
        new = ~(self.words[slots] > 0).all((1, 2))
        if new.any():  # what is there stays, so that predictions do not hang on what a window came with last
            likeliest = Likeliest.of(logits(), self.count, self.temperature)
            self.log_p[slots[new]] = likeliest.log_p.cpu().numpy()[new].astype(np.float16)
            self.words[slots[new]] = likeliest.words.cpu().numpy()[new] + 1
        return Likeliest(
            torch.from_numpy(self.words[slots]).long() - 1, torch.from_numpy(self.log_p[slots].astype(np.float32))
        )


def _normaliser(windows: Iterable[Tensor]) -> Tensor:
    """log Σ exp(logits), (…, 1), a window at a time: it takes a copy of them."""
    return torch.stack([logits.logsumexp(-1, keepdim=True) for logits in windows])


def bytes_kept(tokens: int, count: int) -> int:
    """Of the predictions for so many tokens, at most."""
    return BYTES * tokens * count


def _slots(windows: PackedWindows) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A number for every window, the same for equal ones, from 0 on."""
    width = windows.ids.shape[1]
    factors = np.random.default_rng(0).integers(1, 2**63, (2, width), dtype=np.uint64) | np.uint64(1)
    sums = []
    for part in windows.split(TOGETHER):
        parts = (part.ids,) if part.positions is None else (part.ids, part.positions)
        sums.append(sum((one.numpy().astype(np.uint64) * by).sum(-1) for one, by in zip(parts, factors, strict=False)))
    return np.unique(np.concatenate(sums), return_inverse=True)[1]


def _on_disk(file: Path, kind: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """An array in a file, which is zero where the file is new. Its room is taken at once: a map has no way to say later
    that the disk is full."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    try:
        with file.open("ab") as opened:
            if opened.tell() < size:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(opened.fileno(), 0, size)
                else:
                    opened.truncate(size)
    except OSError as error:
        raise not_written(error, f"{size / 2**20:,.0f} MiB of predictions cannot be kept", file.parent) from error
    return np.memmap(file, kind, "r+", shape=shape)
