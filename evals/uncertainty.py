"""Paired differences with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval: the 2.5 % and 97.5 % quantiles over resampled windows.

    One window tells nothing of its spread: the bounds are None.
    """

    value: float
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap_ratio(totals: Tensor, counts: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Σ totals ÷ Σ counts over windows, with a percentile interval from resampling the windows.

    Windows, not tokens, since neighbouring tokens err together. Pass paired differences as totals to get the
    interval of a difference.

    Args:
        totals, counts: sum over a window and number of its tokens, shape (windows,).
    """
    totals, counts = totals.double(), counts.double()
    value = float(totals.sum() / counts.sum())
    if len(totals) < 2:
        return Interval(value, None, None)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(0, resamples, 500):
        drawn = torch.randint(len(totals), (500, len(totals)), generator=generator)
        found.append(totals[drawn].sum(1) / counts[drawn].sum(1))
    low, high = torch.cat(found).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def mean_of(parts: Sequence[Mapping[str, float | None]]) -> Interval:
    """The mean of independent estimates, with the interval that theirs imply: half-widths added in quadrature.

    Args:
        parts: intervals as :meth:`Interval.as_dict` gives them; where one has no bounds, the mean has none.
    """
    values = [part["value"] or 0.0 for part in parts]
    mean = sum(values) / len(values)
    sides = []
    for bound in ("low", "high"):
        ends = [part[bound] for part in parts]
        known = [end - value for end, value in zip(ends, values, strict=True) if end is not None]
        sides.append(math.hypot(*known) / len(parts) if len(known) == len(parts) else None)
    low, high = sides
    return Interval(mean, None if low is None else mean - low, None if high is None else mean + high)


def paired_difference(before: list[float], after: list[float]) -> tuple[float, float | None]:
    """Mean of after − before over the same samples, and its standard error s/√n; None for a single sample."""
    change = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else None
    return float(change.mean()), error
