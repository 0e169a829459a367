"""Attention for one new token on a CPU, where heads share keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

KERNEL = "sdpa"
OTHERWISE = ("attention_mask", "position_bias", "cache")  # arguments with which heads are not packed


@contextmanager
def packed_heads(device: torch.device) -> Iterator[None]:
    """Inside, the heads of a group attend together, as so many queries of one head.

    For a single query torch's kernel for CPUs reads the keys and values of a group once for every head of it, which
    takes several times as long. On other devices, and for all that is not one query without a mask, nothing changes;
    nor where something else stands in the place of transformers' function.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if device.type != "cpu" or ALL_ATTENTION_FUNCTIONS[KERNEL] is not sdpa_attention_forward:
        yield
        return

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any) -> Any:
        heads, queries = query.shape[1:3]
        groups = key.shape[1]
        bent = [*given, *(named.get(name) for name in OTHERWISE)]
        if queries > 1 or heads == groups or any(argument is not None for argument in bent):
            return sdpa_attention_forward(module, query, key, value, *given, **named)
        alone: Any = SimpleNamespace()  # a module that knows of no groups
        packed = query.view(len(query), groups, heads // groups, -1)
        named = {**named, "attention_mask": None, "is_causal": False}
        written, weights = sdpa_attention_forward(alone, packed, key, value, **named)
        return written.transpose(1, 2).reshape(len(written), 1, heads, -1), weights

    ALL_ATTENTION_FUNCTIONS[KERNEL] = attend
    try:
        yield
    finally:
        if ALL_ATTENTION_FUNCTIONS[KERNEL] is attend:
            del ALL_ATTENTION_FUNCTIONS[KERNEL]
