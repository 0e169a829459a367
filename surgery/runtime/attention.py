"""Attention for one new token on a CPU, where heads share keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def packed_heads(device: torch.device) -> Iterator[None]:
    """Inside, the heads of a group attend together, as so many queries of one head.

    For a single query torch's kernel for CPUs reads the keys and values of a group once for every head of it, which
    takes several times as long. On other devices, and for all that is not one query without a mask, nothing changes.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
        rows, heads, queries, width = query.shape
        groups = key.shape[1]
        bent = mask is not None or more.get("position_bias") is not None or more.get("cache") is not None
        if queries > 1 or heads == groups or bent:
            return known(module, query, key, value, mask, **more)
        alone = SimpleNamespace()  # a module that knows of no groups
        packed = query.view(rows, groups, heads // groups, width)
        written, weights = known(alone, packed, key, value, None, **{**more, "is_causal": False})
        return written.transpose(1, 2).reshape(rows, 1, heads, -1), weights

    if device.type != "cpu":
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not known:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = known
