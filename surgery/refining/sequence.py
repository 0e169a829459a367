"""Which windows a step trains on: those that were read, in one seeded order after another, and among them windows of
the original's own texts, as they are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.refining.own_texts import OwnTexts
from surgery.refining.packing import PackedWindows, joined

FRESH = -1  # the number of a window that comes once


class TrainingWindows:
    """Windows for one step after another.

    Args:
        texts: windows that were read, (n, length).
        own: where the original's own come from, if there are to be any.
        seed: of the order. Every window comes before any of a text returns.
    """

    def __init__(self, texts: PackedWindows, own: OwnTexts | None, seed: int) -> None:
        self.texts, self.own, self.seed = texts, own, seed
        self.orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Windows until one of a text returns."""
        return len(self.texts) + (self.own.count if self.own else 0)

    @property
    def length(self) -> int:
        return self.texts.ids.shape[1]

    @property
    def drawing_seconds(self) -> float:
        return self.own.seconds if self.own else 0.0

    def of_step(self, step: int, rows: int) -> PackedWindows:
        """The windows of a step of `rows`, which know their numbers among the texts'; steps are asked for in order."""
        numbers = torch.tensor([self._number(place) for place in range(step * rows, (step + 1) * rows)])
        read = numbers[numbers < len(self.texts)]
        found = self.texts.numbered(read)
        if self.own is None or len(read) == rows:
            return found
        fresh = self.own.take(rows - len(read))
        return joined((found, PackedWindows(fresh.ids, fresh.positions, torch.full((len(fresh),), FRESH))))

    def _number(self, place: int) -> int:
        epoch, place = divmod(place, len(self))
        if epoch not in self.orders:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            before = {number: order for number, order in self.orders.items() if number == epoch - 1}
            self.orders = {**before, epoch: torch.randperm(len(self), generator=generator)}
        return int(self.orders[epoch][place])

    def again(self) -> TrainingWindows:
        """The same from the first step on."""
        return TrainingWindows(self.texts, self.own.again() if self.own else None, self.seed)

    def state(self) -> dict[str, Any] | None:
        """What :meth:`load_state` needs to go on with the next step."""
        return self.own.state() if self.own else None

    def load_state(self, state: dict[str, Any] | None) -> None:
        if self.own and state:
            self.own.load_state(state)
