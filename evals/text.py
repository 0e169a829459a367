"""Text to measure on: one stream of tokens, cut into windows that score every token once.

The documents of a source are joined by the end-of-text token. A window holds up to `length` tokens, with the start
token where the tokenizer puts one; the next starts `stride` tokens later. Each token of the text is predicted in the
first window in which something stands before it, so with stride < length every prediction after the first window has at
least length − stride tokens of context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.texts import special_tokens, tokens_of
from surgery.errors import EvaluationError


@dataclass(frozen=True)
class MeasuredText:
    """Windows of one text.

    Attributes:
        source: what was read.
        windows: token ids, (windows, length).
        fresh: True where a window predicts a token that no earlier window predicted, (windows, length − 1).
        stride: tokens between the starts of two windows.
        text_bytes: UTF-8 bytes of the tokens predicted.
        fingerprint: SHA-256 of the ids.
    """

    source: str
    windows: Tensor
    fresh: Tensor
    stride: int
    text_bytes: int
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return int(self.fresh.sum())

    @property
    def length(self) -> int:
        return self.windows.shape[1]

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "tokens": self.tokens,
            "windows": len(self.windows),
            "window": self.length,
            "stride": self.stride,
            "bytes": self.text_bytes,
            "fingerprint": self.fingerprint,
        }


def read(
    source: str, tokenizer: Any, *, tokens: int, length: int, stride: int | None = None, skip: int = 0
) -> MeasuredText:
    """Windows over tokens skip … skip + tokens of a text source (see :mod:`surgery.calibration.inputs`).

    Raises:
        EvaluationError: less text than one window, or a stride that leaves gaps.
    """
    before, after = special_tokens(tokenizer) if tokenizer is not None else ([], [])
    room = length - len(before) - len(after)
    stride = room if stride is None or stride == length else stride
    if not 0 < stride <= room or room < 2:
        raise EvaluationError(
            f"a stride of {stride} with windows of {length} tokens", fix="the stride is at least 1, at most the window"
        )
    ids = tokens_of(source, tokenizer, tokens, skip)
    if len(ids) < room:
        raise EvaluationError(
            f"{len(ids)} tokens are fewer than one window of {length}"
            + (f", after the {skip} that calibration used" if skip else ""),
            where=source,
            fix="give more text, or lower --window",
        )
    return cut(ids, source, room, stride, tokenizer, (before, after))


def cut(
    ids: Tensor,
    source: str,
    length: int,
    stride: int,
    tokenizer: Any | None = None,
    special: tuple[list[int], list[int]] = ([], []),
) -> MeasuredText:
    """Windows over token ids, shape (tokens,); a rest too short for a whole stride is left out.

    Args:
        special: ids before and after every `length` tokens of text; predicted are tokens of the text alone.
    """
    starts = range(0, len(ids) - length + 1, stride)
    bodies = torch.stack([ids[start : start + length] for start in starts])
    before, after = (torch.tensor(part, dtype=ids.dtype).expand(len(bodies), -1) for part in special)
    windows = torch.cat([before, bodies, after], dim=1)
    fresh = torch.zeros_like(windows, dtype=torch.bool)
    text = fresh[:, before.shape[1] : windows.shape[1] - after.shape[1]]
    text[0], text[1:, length - stride :] = True, True
    fresh = fresh[:, 1:]  # the first token of a window has nothing before it
    scored = windows[:, 1:][fresh]
    size = 0 if tokenizer is None else len(tokenizer.decode(scored, skip_special_tokens=True).encode())
    digest = hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()
    return MeasuredText(source, windows, fresh, stride, size, digest)


def batches(windows: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    """Model inputs, `size` windows at a time."""
    for part in windows.split(size):
        yield {"input_ids": part}
