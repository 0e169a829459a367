"""Text → windows of one length, in which no document sees another.

Documents follow one another in a window; positions start anew with each, and transformers' masks keep apart what
positions keep apart (`find_packed_sequence_indices`). Where a model's mask does not follow its positions, as in OPT,
windows are cut from the text as it comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.texts import special_tokens


@dataclass(frozen=True)
class PackedWindows:
    """Token ids (n, length), and positions of the same shape, or None where the model takes none; int32.

    Attributes:
        numbers: (n,), of windows that were drawn from others (:meth:`numbered`); negative: of no others.
    """

    ids: Tensor
    positions: Tensor | None
    numbers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> PackedWindows:
        parts = (self.ids, self.positions, self.numbers)
        ids, positions, numbers = (None if part is None else part[rows] for part in parts)
        assert ids is not None
        return PackedWindows(ids, positions, numbers)

    def numbered(self, rows: Tensor) -> PackedWindows:
        """Some of the windows, which know what numbers they have here."""
        return replace(self[rows], numbers=rows)

    def inputs(self, device: Any) -> dict[str, Tensor]:
        """Arguments of the model's forward pass."""
        given = {"input_ids": self.ids, "position_ids": self.positions}
        return {name: value.to(device).long() for name, value in given.items() if value is not None}

    def split(self, size: int) -> list[PackedWindows]:
        """Parts of at most `size` windows."""
        return [self[start : start + size] for start in range(0, len(self), size)]


def joined(parts: Sequence[PackedWindows]) -> PackedWindows:
    """All windows of the parts, which have positions or numbers all or none."""
    ids = torch.cat([part.ids for part in parts])
    positions = [part.positions for part in parts if part.positions is not None]
    numbers = [part.numbers for part in parts if part.numbers is not None]
    return PackedWindows(ids, torch.cat(positions) if positions else None, torch.cat(numbers) if numbers else None)


Row = tuple[Tensor, Tensor]
"""Ids and positions of one window, (length,) int32 each."""


def packable(model: Any) -> bool:
    """Whether positions keep documents apart in this model. It is tried: some take positions and mask without them."""
    if not model.can_generate() or "position_ids" not in signature(model.forward).parameters:
        return False
    ids = torch.arange(3, 27, device=model.device)[None] % model.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(8), torch.arange(16)]).to(model.device)[None]
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 8:].float()
        alone = model(input_ids=ids[:, 8:], use_cache=False).logits.float()
    return bool((together - alone).norm() < 1e-3 * alone.norm())


def cut(texts: Iterable[Sequence[int]], begin: int, end: int) -> Iterator[tuple[Sequence[int], bool]]:
    """Pieces of documents, and whether each lies in the ids begin … end, counted through one document after another."""
    at = 0
    for text in texts:
        edges = [0, *(min(max(edge - at, 0), len(text)) for edge in (begin, end)), len(text)]
        for (first, last), inside in zip(pairwise(edges), (False, True, False), strict=True):
            if last - first > 1:
                yield text[first:last], inside
        at += len(text)


class Packer:
    """Documents one after another in windows of `length` ids.

    Every piece of a document begins with what the tokenizer puts before a text, since that is the text models know.
    """

    def __init__(self, length: int, tokenizer: Any) -> None:
        self.length = length
        self.before, self.after = special_tokens(tokenizer)
        self.filler = tokenizer.eos_token_id or 0
        self.row: list[int] = []
        self.place: list[int] = []

    def add(self, text: Sequence[int]) -> Iterator[Row]:
        """The windows that a document fills up."""
        at = 0
        while at < len(text):
            room = self.length - len(self.row) - len(self.before) - len(self.after)
            if room < 2:  # too little for a piece: the row is filled up as part of the last one
                last = self.place[-1] if self.place else -1
                left = self.length - len(self.row)
                self.place += range(last + 1, last + 1 + left)
                self.row += [self.filler] * left
            else:
                piece = [*self.before, *text[at : at + room], *self.after]
                at += room
                self.row += piece
                self.place += range(len(piece))
            if len(self.row) == self.length:
                yield torch.tensor(self.row, dtype=torch.int32), torch.tensor(self.place, dtype=torch.int32)
                self.row, self.place = [], []


def pack(texts: Iterable[Sequence[int]], length: int, tokenizer: Any, with_positions: bool) -> PackedWindows:
    """Windows of `length` ids; what does not fill the last one is left out."""
    packer = Packer(length, tokenizer)
    found = [row for text in texts for row in packer.add(text)]
    none = torch.zeros(0, length, dtype=torch.int32)
    ids, positions = (torch.stack(parts) for parts in zip(*found, strict=True)) if found else (none, none)
    return PackedWindows(ids, positions if with_positions else None)
