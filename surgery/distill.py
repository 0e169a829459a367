"""What distillation needs to know of a twin: which parameters to train, what to share with the teacher, the loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.blocks import survey
from surgery.errors import ModelError, RecipeError, did_you_mean

SETS = ("coefficients", "readout", "block", "all")
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


def replaced_modules(twin: Any) -> list[tuple[tuple[str, ...], str]]:
    """For every polynomial block: paths of its modules, and what the names of its last map begin with."""
    found: list[tuple[tuple[str, ...], str]] = []
    for entry in getattr(twin.config, "polynomial_blocks", None) or ():
        if entry["kind"].startswith("plain"):
            found.append(((entry["first"], entry["activation"], entry["last"]), f"{entry['last']}."))
        else:
            last = {"affine": ".", "experts": ".down_"}.get(entry["kind"], ".down_proj.")
            found.append(((entry["path"],), entry["path"] + last))
    return found or [((block.path,), f"{block.last}.") for block in survey(twin).blocks]


def names_inside(blocks: list[tuple[tuple[str, ...], str]]) -> tuple[str, ...]:
    """Beginnings of the names of what is in the replaced blocks, as :func:`replaced_modules` gives them."""
    return tuple(f"{path}." for paths, _ in blocks for path in paths)


def named_trainable(
    twin: Any, which: str, blocks: list[tuple[tuple[str, ...], str]] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters to train, by name; all others are frozen.

    Args:
        blocks: as :func:`replaced_modules` gives them, where `twin` is the original of the twin they are of.
    Raises:
        RecipeError: an unknown set, or one that this twin does not have.
    """
    if which not in SETS:
        raise RecipeError(f"no set of parameters {which!r}{did_you_mean(which, SETS)}", fix=f"one of {', '.join(SETS)}")
    blocks = replaced_modules(twin) if blocks is None else blocks
    inside = names_inside(blocks)
    last = tuple(beginning for _, beginning in blocks)
    chosen = {}
    for name, parameter in twin.named_parameters():
        wanted = {
            "all": True,
            "block": name.startswith(inside),
            "readout": name.startswith(last),
            "coefficients": name.startswith(inside) and name.endswith("coefficients"),
        }[which]
        parameter.requires_grad_(wanted)
        if wanted:
            chosen[name] = parameter
    if not chosen:
        raise RecipeError(
            f"this twin has no {which} to train",
            cause="a native twin's coefficients are folded into its weights",
            fix="train the readout or the block",
        )
    return chosen


def _rounded_alike(own: Tensor, other: Tensor) -> bool:
    """Equal but for the rounding of a stored precision, float16 or bfloat16."""
    return bool((own - other).norm() <= 2e-3 * other.norm())


def share(twin: Any, teacher: Any, trained: set[str], inside: tuple[str, ...]) -> int:
    """Lets the teacher use the twin's tensors wherever nothing is trained; the bytes this saves.

    Args:
        inside: beginnings of the names in the replaced blocks (:func:`names_inside`), which stay the teacher's own.

    Raises:
        ModelError: the teacher is not what the twin was made from: outside the blocks their weights differ.
    """
    ours = {name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in twin.named_parameters()}
    saved = 0
    for name, parameter in list(teacher.named_parameters()):
        if name.startswith(inside):
            continue
        own = ours.get(name)
        if own is None or own.shape != parameter.shape or not _rounded_alike(own, parameter):
            raise ModelError(
                f"{name} differs between the teacher and the twin",
                cause="the twin was made from another model",
                fix="name the model that the twin was converted from",
            )
        if name not in trained:
            parameter.data = own.data
            saved += own.numel() * own.element_size()
    teacher.requires_grad_(False)
    return saved
