"""Token ids → windows: long and short ones, with random tokens in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.held_out import fitted_sequences
from surgery.calibration.samples import sample, start_tokens
from surgery.calibration.texts import frame, tokens_of
from surgery.errors import CalibrationError

SHORT = 64  # tokens of a short window


@dataclass(frozen=True)
class TextPieces:
    """How much of a text, in what pieces."""

    tokens: int
    length: int
    short: float
    unseen: int

    @property
    def mixed(self) -> bool:
        return self.short > 0 and self.length > SHORT

    def of_text(self, source: str, tokenizer: Any) -> tuple[list[Tensor], Tensor | None]:
        """Sets of windows to calibrate on, and unseen ones: of the tokens after those; of a short text a quarter."""
        ids = tokens_of(source, tokenizer, self.tokens + self.unseen)
        framed, start = frame(tokenizer), start_tokens(tokenizer)
        room = self.length - len(framed[0]) - len(framed[1])
        spare = min(self.unseen, max(len(ids) - self.tokens, len(ids) // 4, room)) if len(ids) >= 3 * room else 0
        ids, rest = ids[: len(ids) - spare], ids[len(ids) - spare :]
        unseen = sequences(rest, self.length, framed, source, 1) if len(rest) >= room else None
        share = round(len(ids) * (1 - self.short))
        if not self.mixed or share < 2 * room or len(ids) - share < SHORT:
            return [sequences(ids, self.length, framed, source)], unseen
        long = sequences(ids[:share], self.length, framed, source)
        if start and not framed[0]:
            long[::2, 0] = start[0]
        return [long, sequences(ids[len(long) * room :], SHORT, (start, framed[1]), source, 1)], unseen

    def of_samples(self, model: Any, tokenizer: Any, seed: int, limit: int) -> tuple[list[Tensor], Tensor | None]:
        """The same of the model's own texts, of up to `limit` tokens."""
        torch.manual_seed(seed)
        short = int(self.tokens * self.short) // SHORT if self.mixed else 0
        rows, extra = -(-(self.tokens - short * SHORT) // self.length), -(-self.unseen // self.length)
        midst = short > 0 and self.length < limit and not (tokenizer is not None and frame(tokenizer)[0])
        drawn = sample(model, tokenizer, rows + extra, self.length + midst)
        if midst:
            drawn = torch.stack([row[number % 2 :][: self.length] for number, row in enumerate(drawn)])
        sets = [drawn[:rows]] + ([sample(model, tokenizer, short, SHORT)] if short else [])
        return sets, drawn[rows:] if extra else None


def sequences(
    ids: Tensor, length: int, framed: tuple[list[int], list[int]] = ([], []), where: str = "given", least: int = 2
) -> Tensor:
    """Sequences of `length` tokens, frame included, from a stream of ids; (sequences, length). A rest is left out.

    Raises:
        CalibrationError: fewer than `least` sequences.
    """
    before, after = (torch.tensor(part, dtype=ids.dtype) for part in framed)
    room = length - len(before) - len(after)
    rows = len(ids) // room if room > 0 else 0
    if rows < least:
        raise CalibrationError(
            f"{len(ids)} tokens are fewer than {'one sequence' if least == 1 else 'two sequences'} of {length}",
            where=where,
            cause="the text is short, or few tokens were asked for",
            fix="give more text or more --tokens, or shorter sequences (--length; --window where there is one)",
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
