"""Token ids → windows: long and short ones, from all over a text, with random tokens in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.drawn_once import drawn_once
from surgery.calibration.held_out import HELD_OUT_SHARE, fitted_sequences
from surgery.calibration.samples import seed_of, start_tokens
from surgery.calibration.sentences import openings_of
from surgery.calibration.texts import special_tokens, tokens_of
from surgery.errors import CalibrationError

SHORT = 64  # tokens of a short sample
SENTENCE = 16  # tokens of a short window of a text; what a model does first after its start token is learnt there alone
SPREAD = 8  # times as many tokens as are wanted are read, and windows taken from all over them


@dataclass(frozen=True)
class Windows:
    """Of one source.

    Attributes:
        sets: windows to calibrate on, (windows, length) of each length.
        unseen: windows that no fit may see; None where there are none.
        end: tokens of the source up to the last that may be calibrated on; 0 for samples.
    """

    sets: tuple[Tensor, ...]
    unseen: Tensor | None
    end: int = 0

    @property
    def tokens(self) -> int:
        return sum(ids.numel() for ids in self.sets)


@dataclass(frozen=True)
class TextPieces:
    """How much of a text, in what pieces.

    Attributes:
        least: long windows at least.
    """

    tokens: int
    length: int
    short: float
    unseen: int
    least: int = 2

    @property
    def mixed(self) -> bool:
        return self.short > 0 and self.length > SHORT

    def of_text(self, source: str, tokenizer: Any) -> Windows:
        """Windows from all over the text, but for its end: a quarter of it, where the whole of it was read.

        Short ones begin where a sentence does, or anywhere in a text without sentences.
        Unseen are the tokens that follow; of a text shorter than was asked for a quarter.
        """
        most = SPREAD * self.tokens + self.unseen
        ids = tokens_of(source, tokenizer, most)
        special, start = special_tokens(tokenizer), start_tokens(tokenizer)
        room = self.length - len(special[0]) - len(special[1])
        spare = min(self.unseen, max(len(ids) - self.tokens, len(ids) // 4, room)) if len(ids) >= 3 * room else 0
        end = len(ids) - spare
        if len(ids) < most:
            end = min(end, max(self.tokens, 3 * len(ids) // 4))
        rest = ids[end : end + spare]
        unseen = sequences(rest, self.length, special, source, 1) if len(rest) >= room else None
        ids = ids[:end]
        used, plenty = min(len(ids), self.tokens), len(ids) > self.tokens
        share = round(used * (1 - self.short))
        if not self.mixed or share < self.least * room or used - share < SENTENCE:
            long = sequences(ids, self.length, special, source, self.least)
            return Windows((_evenly(long, max(self.least, used // room)),), unseen, end)
        long = sequences(ids if plenty else ids[:share], self.length, special, source, self.least)
        long = _evenly(long, share // room)
        if start and not special[0]:
            long[::2, 0] = start[0]
        rest = ids if plenty else ids[len(long) * room :]
        wanted, frame = (used - len(long) * room) // SENTENCE, (start, special[1])
        short = openings_of(rest, SENTENCE, frame, tokenizer, wanted)
        if len(short) < wanted / 2:
            short = _evenly(sequences(rest, SENTENCE, frame, source, 1), wanted)
        return Windows((long, short), unseen, end)

    def of_samples(self, model: Any, tokenizer: Any, seed: int, limit: int) -> Windows:
        """The same of the model's own texts, of up to `limit` tokens."""
        short = int(self.tokens * self.short) // SHORT if self.mixed else 0
        rows, extra = -(-(self.tokens - short * SHORT) // self.length), -(-self.unseen // self.length)
        midst = short > 0 and self.length < limit and not (tokenizer is not None and special_tokens(tokenizer)[0])
        drawn = drawn_once(model, tokenizer, rows + extra, self.length + midst, seed)
        if midst:
            drawn = torch.stack([row[number % 2 :][: self.length] for number, row in enumerate(drawn)])
        sets = [drawn[:rows]] + ([drawn_once(model, tokenizer, short, SHORT, seed_of(seed, "short"))] if short else [])
        return Windows(tuple(sets), drawn[rows:] if extra else None)


def _evenly(rows: Tensor, wanted: int) -> Tensor:
    """At most `wanted` of the rows, in their order, at equal distances."""
    there = len(rows)
    return rows if there <= wanted else rows[torch.arange(wanted) * there // max(1, wanted)].clone()


def joined(found: Sequence[Windows]) -> tuple[list[Tensor], Tensor | None]:
    """The windows of several sources by length, longest first, and the unseen ones.

    The last of every source stay the last: they are held out of the fit (:func:`fitted_sequences`), and so the ridge
    is chosen on all kinds of text.
    """
    lengths = sorted({ids.shape[1] for each in found for ids in each.sets}, reverse=True)
    sets = []
    for length in lengths:
        parts = [ids for each in found for ids in each.sets if ids.shape[1] == length]
        held = [len(ids) // HELD_OUT_SHARE for ids in parts]
        first = [ids[: len(ids) - last] for ids, last in zip(parts, held, strict=True)]
        sets.append(torch.cat([*first, *(ids[len(ids) - last :] for ids, last in zip(parts, held, strict=True))]))
    unseen = [each.unseen for each in found if each.unseen is not None]
    return sets, torch.cat(unseen) if unseen else None


def sequences(
    ids: Tensor, length: int, special: tuple[list[int], list[int]] = ([], []), where: str = "given", least: int = 2
) -> Tensor:
    """Sequences of `length` tokens, special ones included, from a stream of ids; (sequences, length). No rest is kept.

    Raises:
        CalibrationError: fewer than `least` sequences.
    """
    before, after = (torch.tensor(part, dtype=ids.dtype) for part in special)
    room = length - len(before) - len(after)
    rows = len(ids) // room if room > 0 else 0
    if rows < least:
        raise CalibrationError(
            f"{len(ids)} tokens are fewer than {'one sequence' if least == 1 else 'two sequences'} of {length}",
            where=where,
            cause="the text is short, or few tokens were asked for",
            fix="give more text or more --tokens, or shorter windows (--window)",
        )
    bodies = ids[: rows * room].view(rows, room)
    return torch.cat([before.expand(rows, -1), bodies, after.expand(rows, -1)], dim=1)


def with_random_tokens(ids: Tensor, share: float, words: Tensor, special: Tensor, seed: int = 0) -> Tensor:
    """Tokens replaced by random ones of the vocabulary, each with probability `share`; special ones stay.

    The sequences that no block is fitted on stay as they are: what is measured on them is measured on text.

    Args:
        ids: (sequences, length).
        words, special: the vocabulary's ids, which are drawn alike, and those that are kept, (numbers,).
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(ids.shape, generator=draw) < share) & ~torch.isin(ids, special)
    (fitted,) = fitted_sequences([{"input_ids": ids}])
    chosen[fitted:] = False
    return torch.where(chosen, words[torch.randint(len(words), ids.shape, generator=draw)], ids)


def vocabulary(tokenizer: Any, model: Any) -> tuple[Tensor, Tensor]:
    """Ids of words that the model has embeddings for, and of special tokens."""
    special = set(tokenizer.all_special_ids)
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    words = [number for number in tokenizer.get_vocab().values() if rows is None or number < rows]
    return torch.tensor(sorted(set(words) - special)), torch.tensor(sorted(special), dtype=torch.long)
