"""Documents → their sentences, each by itself, as short prompts are."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from surgery.calibration.samples import start_tokens
from surgery.calibration.texts import special_tokens

SHORTEST, LONGEST = 4, 64  # tokens of a sentence
ENDS = (".", "!", "?", ";", ":")


def sentences(texts: Iterable[Sequence[int]], tokenizer: Any) -> list[array[int]]:
    """Every sentence or line of the texts as ids, with a start token before it, as short texts are given to a model.

    Where the tokenizer puts one there itself it is left out here. What is longer than LONGEST is cut there, what is
    shorter than SHORTEST goes with the next.
    """
    before, _ = special_tokens(tokenizer)
    start = [] if before else start_tokens(tokenizer)
    special = set(tokenizer.all_special_ids) - {getattr(tokenizer, "unk_token_id", None)}
    ends: dict[int, bool] = {}

    def closes(token: int) -> bool:
        if token not in ends:
            text = tokenizer.decode([token])
            ends[token] = "\n" in text or text.rstrip().endswith(ENDS)
        return ends[token]

    def cut(text: Sequence[int]) -> Iterator[list[int]]:
        piece: list[int] = []
        for token in text:
            if token in special:
                continue
            piece.append(token)
            if len(piece) == LONGEST or (len(piece) >= SHORTEST and closes(token)):
                yield piece
                piece = []
        if len(piece) >= SHORTEST:
            yield piece

    return [array("i", [*start, *piece]) for text in texts for piece in cut(text)]
