"""Token perplexity over non-overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.on_disk import device_of


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
