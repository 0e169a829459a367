"""Training windows in a file of their own, so that a training text of any length takes no memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.calibration.sentences import Sentences
from surgery.refining.packing import PackedWindows, Packer, Row

AT_ONCE = 4096  # windows copied from one file to another
STRETCH = 256  # tokens of a text that become sentences together


class WindowFile:
    """Windows of `length` tokens, appended to a nameless file, which is gone with the last that reads it.

    Args:
        folder: on the disk to use.
        with_positions: whether the windows have positions, as :class:`PackedWindows` may.
    """

    def __init__(self, folder: Path, length: int, with_positions: bool) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it is closed with this object
        self.folder, self.length, self.with_positions = folder, length, with_positions
        self.count = 0

    def another(self) -> WindowFile:
        """An empty one of the same kind."""
        return WindowFile(self.folder, self.length, self.with_positions)

    def extend(self, rows: Iterable[Row]) -> None:
        """Appends what :class:`surgery.refining.packing.Packer` fills: ids and positions, (length,) int32 each."""
        for row in rows:
            self._write(torch.stack(row))
            self.count += 1

    def choose(self, windows: PackedWindows, which: Tensor) -> None:
        """Appends some of the windows, in this order."""
        for rows in which.split(AT_ONCE):
            part = windows[rows]
            self._write(torch.stack((part.ids, part.ids if part.positions is None else part.positions), 1))
            self.count += len(part)

    def _write(self, values: Tensor) -> None:
        self.file.write(values.numpy().tobytes())

    def windows(self) -> PackedWindows:
        """All of them so far, as they lie on disk."""
        self.file.flush()
        if not self.count:
            none = torch.zeros(0, self.length, dtype=torch.int32)
            return PackedWindows(none, none if self.with_positions else None)
        mapped = np.memmap(self.file, np.int32, "c", shape=(self.count, 2, self.length))
        both = torch.from_numpy(mapped)
        return PackedWindows(both[:, 0], both[:, 1] if self.with_positions else None)


def packed(
    pieces: Iterable[tuple[Sequence[int], bool]], length: int, short: float, tokenizer: Any, beside: WindowFile
) -> tuple[list[Sequence[int]], PackedWindows, PackedWindows]:
    """Of pieces, each held out or not: those held out, windows of the others, and windows of sentences out of them.

    A share `short` of every text's stretches becomes sentences.
    """
    kept: list[Sequence[int]] = []
    sentences = Sentences(tokenizer)
    packers = [Packer(length, tokenizer) for _ in range(2)]
    long, alone = files = [beside.another() for _ in range(2)]
    total = taken = 0
    for piece, inside in pieces:
        if inside:
            kept.append(piece)
            continue
        for stretch in [piece[at : at + STRETCH] for at in range(0, len(piece), STRETCH)] if short else [piece]:
            total += len(stretch)
            which = taken + len(stretch) <= short * total
            taken += which * len(stretch)
            for text in sentences.of(stretch) if which else [stretch]:
                files[which].extend(packers[which].add(text))
    return kept, long.windows(), alone.windows()
