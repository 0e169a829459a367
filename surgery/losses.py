"""Perplexity and divergence of a model's predictions, over non-overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.runtime.weights_on_disk import device_of


@dataclass(frozen=True)
class Perplexity:
    """nats: mean negative log-likelihood per predicted token; tokens: how many were predicted."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def token_nats(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """−log p(token | its window so far) of every token but each window's first.

    Args:
        model: a causal language model.
        batches: `input_ids` of shape (rows, length), one window a row; `attention_mask` 0 where padded.
    Returns:
        float32, (all rows, length − 1), NaN where padded.
    """
    found: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            ids = batch["input_ids"].to(device_of(model))
            mask = batch.get("attention_mask", torch.ones_like(ids)).to(ids.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            # A row at a time, since logits are the largest tensor here.
            for row, target, kept in zip(logits, ids[:, 1:], mask[:, 1:], strict=True):
                nats = F.cross_entropy(row.float(), target, reduction="none")
                found.append(nats.masked_fill(kept == 0, float("nan")).cpu())
    return torch.stack(found)


def perplexity(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> Perplexity:
    """Mean of :func:`token_nats` over all predicted tokens; arguments as there."""
    nats = token_nats(model, batches).double()
    counted = ~nats.isnan()
    return Perplexity(float(nats[counted].mean()), int(counted.sum()))


class Predictions:
    """What a model predicts for some batches, kept to measure how far it goes from them when it is changed.

    Kept as float16 logits: rounding them by 2⁻¹¹ of their size moves a divergence by some 10⁻⁵ nats.
    """

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.batches = batches
        self.logits = [self._logits(model, batch).half() for batch in batches]

    @staticmethod
    def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            given = {name: value.to(device_of(model)) for name, value in batch.items()}
            logits: Tensor = model(**given, use_cache=False).logits[:, :-1]
        return logits

    def divergence(self, model: Any) -> tuple[float, int]:
        """Σ KL(then ‖ now) over tokens, nats, and their number; padded ones count for nothing."""
        total, count = 0.0, 0
        for batch, before in zip(self.batches, self.logits, strict=True):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, 1:]
            for then, now, kept in zip(before, self._logits(model, batch), real, strict=True):
                p, q = then.float().log_softmax(-1), now.float().log_softmax(-1)
                apart = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
                total += float(apart.double()[kept.to(apart.device) != 0].sum())
                count += int(kept.count_nonzero())
        return total, count
