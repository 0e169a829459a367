"""Documents → their sentences, each by itself, as short prompts are."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from surgery.calibration.samples import start_tokens
from surgery.calibration.texts import special_tokens

SHORTEST, LONGEST = 4, 64  # tokens of a sentence
ENDS = (".", "!", "?", ";", ":")


class Sentences:
    """Cuts ids where a sentence or a line ends, and puts a start token before each, as short texts are given to models.

    Where the tokenizer puts one there itself it is left out here. What is longer than LONGEST is cut there, what is
    shorter than SHORTEST goes with the next.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        before, _ = special_tokens(tokenizer)
        self.start = [] if before else start_tokens(tokenizer)
        self.special = set(tokenizer.all_special_ids) - {getattr(tokenizer, "unk_token_id", None)}
        self.ends: dict[int, bool] = {}

    def of(self, text: Sequence[int]) -> Iterator[array[int]]:
        """The sentences of a document."""
        piece: list[int] = []
        for token in text:
            if token in self.special:
                continue
            piece.append(token)
            if len(piece) == LONGEST or (len(piece) >= SHORTEST and self._closes(token)):
                yield array("i", self.start + piece)
                piece = []
        if len(piece) >= SHORTEST:
            yield array("i", self.start + piece)

    def _closes(self, token: int) -> bool:
        if token not in self.ends:
            text = self.tokenizer.decode([token])
            self.ends[token] = "\n" in text or text.rstrip().endswith(ENDS)
        return self.ends[token]
