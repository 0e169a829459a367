"""Text → windows of one length, in which no document sees another.

Documents follow one another in a window; positions start anew with each, and transformers' masks keep apart what
positions keep apart (`find_packed_sequence_indices`). Where a model's mask does not follow its positions, as in OPT,
windows are cut from the text as it comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.texts import special_tokens


@dataclass(frozen=True)
class PackedWindows:
    """Token ids (n, length), and positions of the same shape, or None where the model takes none; int32."""

    ids: Tensor
    positions: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> PackedWindows:
        return PackedWindows(self.ids[rows], None if self.positions is None else self.positions[rows])

    def inputs(self, device: Any) -> dict[str, Tensor]:
        """Arguments of the model's forward pass."""
        given = {"input_ids": self.ids, "position_ids": self.positions}
        return {name: value.to(device).long() for name, value in given.items() if value is not None}

    def split(self, size: int) -> list[PackedWindows]:
        """Parts of at most `size` windows."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    @staticmethod
    def join(parts: Sequence[PackedWindows]) -> PackedWindows:
        """The windows of all parts, in order."""
        positions = [part.positions for part in parts if part.positions is not None]
        return PackedWindows(torch.cat([part.ids for part in parts]), torch.cat(positions) if positions else None)


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


def cut_out(texts: Sequence[Sequence[int]], begin: int, end: int) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """(outside, inside) of the ids begin … end, counted through the documents one after another."""
    outside: list[Sequence[int]] = []
    inside: list[Sequence[int]] = []
    at = 0
    for text in texts:
        cuts = [min(max(edge - at, 0), len(text)) for edge in (begin, end)]
        outside += [piece for piece in (text[: cuts[0]], text[cuts[1] :]) if len(piece) > 1]
        inside += [text[cuts[0] : cuts[1]]] if cuts[1] - cuts[0] > 1 else []
        at += len(text)
    return outside, inside


def pack(texts: Iterable[Sequence[int]], length: int, tokenizer: Any, with_positions: bool) -> PackedWindows:
    """Windows of `length` ids; what does not fill the last one is left out.

    Every piece of a document begins with what the tokenizer puts before a text, since that is the text models know.
    """
    before, after = special_tokens(tokenizer)
    filler = tokenizer.eos_token_id or 0
    rows: list[Tensor] = []
    places: list[Tensor] = []
    row: list[int] = []
    place: list[int] = []
    taken = len(before) + len(after)
    for text in texts:
        at = 0
        while at < len(text):
            room = length - len(row) - taken
            if room < 2:  # too little for a piece: the row is filled up as part of the last one
                last = place[-1] if place else -1
                place += range(last + 1, last + 1 + length - len(row))
                row += [filler] * (length - len(row))
            else:
                piece = [*before, *text[at : at + room], *after]
                at += room
                row += piece
                place += range(len(piece))
            if len(row) == length:
                rows.append(torch.tensor(row, dtype=torch.int32))
                places.append(torch.tensor(place, dtype=torch.int32))
                row, place = [], []
    none = torch.zeros(0, length, dtype=torch.int32)
    ids, positions = (torch.stack(found) if found else none for found in (rows, places))
    return PackedWindows(ids, positions if with_positions else None)
