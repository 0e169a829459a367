"""Token ids → sentences: each by itself, as short prompts are, or the places where one begins."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.samples import start_tokens
from surgery.calibration.texts import special_tokens

SHORTEST, LONGEST = 4, 64  # tokens of a sentence
ENDS = (".", "!", "?", ";", ":", "。", "！", "？")


class SentenceEnds:
    """Whether a sentence or a line ends with a token, each decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, bool] = {}

    def __call__(self, token: int) -> bool:
        if token not in self.known:
            text = self.tokenizer.decode([token])
            self.known[token] = "\n" in text or text.rstrip().endswith(ENDS)
        return self.known[token]


class Sentences:
    """Cuts ids where a sentence or a line ends, and puts a start token before each, as short texts are given to models.

    Where the tokenizer puts one there itself it is left out here. What is longer than LONGEST is cut there, what is
    shorter than SHORTEST goes with the next.
    """

    def __init__(self, tokenizer: Any) -> None:
        before, _ = special_tokens(tokenizer)
        self.start = [] if before else start_tokens(tokenizer)
        self.special = set(tokenizer.all_special_ids) - {getattr(tokenizer, "unk_token_id", None)}
        self.ends = SentenceEnds(tokenizer)

    def of(self, text: Sequence[int]) -> Iterator[array[int]]:
        """The sentences of a document."""
        piece: list[int] = []
        for token in text:
            if token in self.special:
                continue
            piece.append(token)
            if len(piece) == LONGEST or (len(piece) >= SHORTEST and self.ends(token)):
                yield array("i", self.start + piece)
                piece = []
        if len(piece) >= SHORTEST:
            yield array("i", self.start + piece)


def sentence_starts(ids: Tensor, tokenizer: Any, room: int) -> list[int]:
    """Places where a sentence begins, at least `room` tokens from one another and from the end."""
    ends, places, last = SentenceEnds(tokenizer), [], -room
    for place, token in enumerate([-1, *ids[: len(ids) - room].tolist()]):
        if place - last >= room and (token == -1 or ends(token)):
            places.append(place)
            last = place
    return places


def opening(ids: Tensor, place: int, tokenizer: Any, room: int) -> list[int]:
    """`room` tokens from a place on, spelled as a text that begins there: without the space before the first word."""
    text = tokenizer.decode(ids[place : place + 2 * room].tolist()).lstrip()
    spelled: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:room]
    return spelled if len(spelled) == room else ids[place : place + room].tolist()


def openings_of(ids: Tensor, length: int, frame: tuple[list[int], list[int]], tokenizer: Any, most: int) -> Tensor:
    """At most `most` windows that begin as sentences do, from all over a text, (windows, length).

    Args:
        frame: ids before and after each, which count towards `length`.
    """
    before, after = frame
    room = length - len(before) - len(after)
    places = sentence_starts(ids, tokenizer, room)
    some = [places[number * len(places) // most] for number in range(most)] if len(places) > most else places
    rows = [[*before, *opening(ids, place, tokenizer, room), *after] for place in some]
    return torch.tensor(rows, dtype=ids.dtype).view(-1, length)
