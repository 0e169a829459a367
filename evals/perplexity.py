"""Token perplexity over non-overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Perplexity:
    """nats: mean negative log-likelihood per predicted token; tokens: how many were predicted."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def perplexity(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> Perplexity:
    """Mean −log p(token | its window so far), the first token of each window not predicted.

    Args:
        model: a causal language model.
        batches: `input_ids` of shape (rows, length), one window a row; `attention_mask` 0 where padded.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            ids = batch["input_ids"].to(model.device)
            mask = batch.get("attention_mask", torch.ones_like(ids)).to(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            for row, target in zip(logits, targets, strict=True):  # a row at a time: logits are the largest tensor
                total += float(F.cross_entropy(row.float(), target, reduction="sum", ignore_index=-100))
            count += int((targets != -100).sum())
    return Perplexity(total / max(1, count), count)
