"""The divergence that distillation makes smaller."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 256  # tokens whose probabilities are held at once


def kl(goal: Tensor, found: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(softmax(goal ÷ T) ‖ softmax(found ÷ T)), mean over tokens; logits of shape (…, vocabulary).

    The gradient T (q − p) ÷ n is taken on the way, a piece of the tokens at a time: with 50,000 words the logits are
    the largest tensors of a step, and this keeps one copy of them.
    """
    loss: Tensor = _Divergence.apply(found, goal.detach(), temperature)  # type: ignore[no-untyped-call]
    return loss


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over tokens are kept in: float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: Tensor, goal: Tensor, temperature: float) -> Tensor:
        rows, goals = found.flatten(0, -2), goal.flatten(0, -2)
        wanted = ctx.needs_input_grad[0]  # not when held-out text is looked at
        gradient = torch.empty_like(rows) if wanted else None
        total = torch.zeros((), dtype=sum_dtype(rows.device), device=rows.device)
        for start in range(0, len(rows), PIECE):
            piece = slice(start, start + PIECE)
            q = (rows[piece].float() / temperature).log_softmax(-1)
            p = (goals[piece].float() / temperature).log_softmax(-1)
            total += F.kl_div(q, p, reduction="sum", log_target=True)
            if gradient is not None:
                gradient[piece] = q.exp_().sub_(p.exp_()).mul_(temperature / len(rows))
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(found))
        return (total * temperature**2 / len(rows)).float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None
