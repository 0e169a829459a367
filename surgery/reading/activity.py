"""What a block sees in text: the statistics its polynomial is expanded about, and the tokens that drive a direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.closed_form import sinks
from surgery.errors import CalibrationError

BEFORE, AFTER = 18, 5  # tokens shown around the one that drives a direction most
APART = 12  # tokens between two examples
LEAST_ROWS = 2


@dataclass(frozen=True)
class Activity:
    """A block's inputs over a text; attention sinks and the windows' first tokens are left out of the statistics.

    Attributes:
        ids: token ids, (windows, length).
        x: the block's inputs, (windows · length, d), float64.
        ordinary: rows that are no attention sinks (norm at most 20 times the median) and have some context, bool.
        mean, covariance: of the ordinary rows.
    """

    ids: Tensor
    x: Tensor
    ordinary: Tensor
    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(ids: Tensor, x: Tensor, size: Tensor) -> Activity:
        """From inputs (tokens, d) and norms (tokens,), massive at attention sinks; NaN where the block sees no token.

        Raises CalibrationError where too few rows are left.
        """
        there = ~size.isnan()
        ordinary = there & sinks.ordinary(size)
        ordinary &= torch.arange(len(size)) % ids.shape[1] != 0
        if int(ordinary.sum()) < LEAST_ROWS:
            raise CalibrationError(
                f"the block sees {int(ordinary.sum())} ordinary tokens of this text, too few to say anything",
                cause="few tokens are routed to this expert" if not bool(there.all()) else "the text is short",
                fix="more --tokens, another --text, or another --expert",
            )
        x = x.double().nan_to_num(0.0)
        mean = x[ordinary].mean(0)
        away = x[ordinary] - mean
        return Activity(ids, x, ordinary, mean, away.T @ away / len(away))

    def roots(self) -> tuple[Tensor, Tensor]:
        """R = Σ^½ and its (pseudo-)inverse, (d, d): x = μ + R z with z of covariance I."""
        values, vectors = torch.linalg.eigh(self.covariance)
        keep = values > 1e-10 * values[-1]
        root = values.clamp_min(0).sqrt() * keep
        inverse = torch.where(keep, 1 / root.clamp_min(1e-300), torch.zeros_like(root))
        return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def _word(tokenizer: Any, token: int) -> str:
    """A token as it is read; by its number where there is no tokenizer."""
    return str(token) if tokenizer is None else str(tokenizer.decode([token]))


def examples(activity: Activity, values: Tensor, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """The contexts in which `values`, (tokens,), is largest, no two within a few tokens of each other.

    Each is {"tokens": [...], "values": [...], "peak": index of the driving token, "value": its value}.
    """
    length = activity.ids.shape[1]
    score = values.masked_fill(~activity.ordinary, -torch.inf).clone()
    found: list[dict[str, Any]] = []
    while len(found) < count and bool(torch.isfinite(score).any()):
        at = int(score.argmax())
        window, place = divmod(at, length)
        start, end = max(0, place - BEFORE), min(length, place + AFTER + 1)
        rows = slice(window * length + start, window * length + end)
        found.append(
            {
                "tokens": [_word(tokenizer, int(token)) for token in activity.ids[window, start:end]],
                "values": [round(float(value), 5) for value in values[rows]],
                "peak": place - start,
                "value": float(values[at]),
            }
        )
        score[max(window * length, at - APART) : min((window + 1) * length, at + APART + 1)] = -torch.inf
    return found
