"""The original's own texts to train on, drawn as the training asks for them."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.drawn_once import drawn_once
from surgery.calibration.samples import SAMPLED_TOGETHER, drawing_dtype, sample, seed_of
from surgery.calibration.texts import special_tokens
from surgery.errors import CalibrationError
from surgery.refining import sharding
from surgery.refining.packing import PackedWindows, joined
from surgery.refining.settings import RefineSettings
from surgery.runtime import processes

DRAWN_TOGETHER = 2 * SAMPLED_TOGETHER  # half of them from an opening
FEWEST = 8  # texts that are drawn where the last ones planned did not fill enough windows

Pack = Callable[[Sequence[Sequence[int]]], tuple[PackedWindows, ...]]
"""Texts → windows of every sort that is trained on."""


class OwnTexts:
    """Windows of texts that the original draws, and texts of the same kind to hold out.

    Texts are drawn a unit at a time, each unit from a seed of its own and by one process, so that they do not hang on
    how many processes there are. What was drawn and not taken yet is part of the run's state, and so a killed run goes
    on with the same windows.

    Args:
        count: windows that will be taken.
        pack: makes windows of texts, which are without what the tokenizer puts before texts.

    Attributes:
        seconds: spent drawing what was trained on.
    """

    def __init__(
        self, settings: RefineSettings, teacher: Any, tokenizer: Any, count: int, pack: Pack, quiet: bool
    ) -> None:
        self.settings, self.teacher, self.tokenizer = settings, teacher, tokenizer
        self.count, self.pack, self.quiet = count, pack, quiet or not processes.first()
        lost = -(-count // DRAWN_TOGETHER) if settings.short else 0  # windows that a unit leaves unfilled, of each sort
        self.planned = count + lost
        self.products = processes.looked_up(lambda: drawing_dtype(teacher, tokenizer))
        self.again()

    def again(self) -> OwnTexts:
        """From the first window on."""
        self.drawn, self.seconds, self.left = 0, 0.0, joined(self.pack([]))
        return self

    def held_out(self, tokens: int) -> list[array[int]]:
        """Texts of at least so many tokens, which are not trained on."""
        window, seed = self.settings.window, seed_of(self.settings.seed, "held out")
        given, how = (self.teacher, self.tokenizer, -(-tokens // window), window, seed), self.products
        drawn = processes.looked_up(lambda: drawn_once(*given, products=how, quiet=self.quiet))
        return self._without_beginnings(drawn)

    def take(self, count: int) -> PackedWindows:
        """The next windows.

        Raises:
            CalibrationError: the texts fill no window.
        """
        begun = time.monotonic()
        while len(self.left) < count:
            self._draw_more()
        self.seconds += time.monotonic() - begun
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` needs to go on from here."""
        left = [None if part is None else part.clone() for part in (self.left.ids, self.left.positions)]
        return {"drawn": self.drawn, "seconds": self.seconds, "products": self.products, "left": left}

    def load_state(self, state: dict[str, Any]) -> None:
        self.drawn, self.seconds, self.products = (state[name] for name in ("drawn", "seconds", "products"))
        self.left = PackedWindows(*state["left"])

    def _draw_more(self) -> None:
        """One unit a process, or one that all draw together where each holds a part of the original."""
        apart = not sharding.is_sharded(self.teacher)
        units = _units(self.drawn, self.planned, processes.count() if apart else 1)
        own = units[processes.rank() :][:1] if apart else units
        drawn = [self._unit(*unit) for unit in own]
        texts = [text for part in processes.gather(drawn) for text in part] if apart else processes.from_first(drawn)
        new = [
            self._shuffled(self.pack(self._without_beginnings(text)), first)
            for text, (first, _) in zip(texts, units, strict=True)
        ]
        if not sum(map(len, new)) and sum(rows for _, rows in units) >= FEWEST:
            raise CalibrationError(
                f"what the original writes fills no window of {self.settings.window} tokens",
                where="samples",
                fix="lower --short or --window, or give other texts",
            )
        self.left = joined((self.left, *new))
        self.drawn = sum(units[-1])

    def _unit(self, first: int, rows: int) -> Tensor:
        """Texts number `first` and those after it, (rows, length) ids."""
        given, seed = (self.teacher, self.tokenizer, rows, self.settings.window), self._seed(first)
        return sample(*given, seed=seed, after=first, products=self.products, quiet=self.quiet)

    def _seed(self, first: int) -> int:
        return seed_of(self.settings.seed, f"training {first}")

    def _without_beginnings(self, texts: Tensor) -> list[array[int]]:
        """Without what a tokenizer puts before texts, since it is put before every piece when windows are packed."""
        before, _ = special_tokens(self.tokenizer)
        found = [array("i", row) for row in texts.tolist()]
        return [ids[len(before) :] if list(ids[: len(before)]) == before else ids for ids in found]

    def _shuffled(self, sorts: tuple[PackedWindows, ...], number: int) -> PackedWindows:
        windows = joined(sorts)
        generator = torch.Generator().manual_seed(self._seed(number))
        return windows[torch.randperm(len(windows), generator=generator)]


def _units(first: int, last: int, most: int) -> list[tuple[int, int]]:
    """The next draws from text `first` on, (number of the first, how many); from `last` on a small one."""
    units: list[tuple[int, int]] = []
    while len(units) < most and (not units or first < last):
        units.append((first, min(DRAWN_TOGETHER, last - first) if first < last else FEWEST))
        first = sum(units[-1])
    return units
