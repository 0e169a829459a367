"""Which calibration sequences are fitted on, and which choose the ridge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

HELD_OUT_SHARE = 8


def fitted_sequences(batches: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """How many sequences of each batch are fitted on. The others choose the ridge: whole texts, so that the choice is
    honest. They are the last eighth of all of one length, at least one of two; where no two are of one length, the last
    eighth of all."""
    shapes = [next(iter(batch.values())).shape for batch in batches]
    total: Counter[tuple[int, ...]] = Counter()
    for shape in shapes:
        total[shape[1:]] += shape[0]
    left = {length: max(count // HELD_OUT_SHARE, min(1, count - 1)) for length, count in total.items()}
    more = 0 if any(left.values()) else max(1, total.total() // HELD_OUT_SHARE)
    fitted = []
    for rows, *length in reversed(shapes):
        held = min(rows, left[tuple(length)])
        left[tuple(length)] -= held
        further = min(rows, more)
        more -= further
        fitted.append(rows - held - further)
    return fitted[::-1]
