"""What a conversion costs, on calibration tokens that no fit saw; summed over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from surgery.calibration.mixtures import Mixture
from surgery.conversion.recipe import Recipe
from surgery.losses import Perplexity, Predictions, perplexity
from surgery.runtime import processes


def shared_perplexity(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Perplexity | None:
    """Over the batches of all processes; None where there are none."""
    if not batches:
        return None
    _, mine = processes.own_part(batches)
    own = perplexity(model, mine) if mine else Perplexity(0.0, 0)
    tokens = processes.sum_number(own.tokens)
    return Perplexity(processes.sum_number(own.nats * own.tokens) / tokens, int(tokens))


def nats(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean loss over at least one batch, nats per token."""
    found = shared_perplexity(model, batches)
    assert found is not None
    return found.nats


def divergence(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Callable[[Any], float]:
    """Measures how far a model's predictions, changed, are from those it makes now: mean KL, nats."""
    _, mine = processes.own_part(batches)
    now = Predictions(model, mine)

    def measure(changed: Any) -> float:
        total, count = now.divergence(changed)
        return processes.sum_number(total) / processes.sum_number(count)

    return measure


def compared(before: Perplexity | None, after: Perplexity | None, plan: Recipe) -> dict[str, Any] | None:
    """The report's `perplexity`; None where nothing was measured."""
    if before is None or after is None:
        return None
    return {
        "original": before.perplexity,
        "twin": after.perplexity,
        "nats": after.nats - before.nats,
        "tokens": before.tokens,
        "text": f"{Mixture.of(plan.text).name}, the {before.tokens} tokens after those used for calibration",
        "window": plan.window,
    }
