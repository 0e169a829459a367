"""What a step of refinement makes smaller. Each runs forward and backward over one batch and returns the loss.

    EndToEnd   T² KL(original ÷ T ‖ twin ÷ T), plus, with `match`, the blocks' errors below
               (for a share `blend` of the steps the twin's blocks write a · twin + (1 − a) · original, a → 1)
    Local      mean over blocks and tokens of ‖f_k(x_k) − t_k‖² ÷ max(‖t_k‖², median ‖t_k‖²)
    NextToken  the text's own next token: what an original trained alike is trained on

x_k is what enters block k in the twin, t_k what the original's block k writes in the original. Local needs no
backward pass through the network: a block's gradients are taken while the forward pass stands at it, so memory holds
one block's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.errors import ModelError
from surgery.refining.kept_predictions import KeptPredictions
from surgery.refining.losses import kl
from surgery.refining.packing import PackedWindows
from surgery.runtime.hooks import hooked

Autocast = Callable[[], AbstractContextManager[Any]]
"""The precision the network computes in."""
Blocks = Sequence[tuple[str, ...]]
"""Of every replaced block the modules its input goes through, by their paths in the twin and in the original."""


class Objective(Protocol):
    """One batch forward and backward; the loss, detached. `done` is the share of the steps done."""

    done: float

    def __call__(self, part: PackedWindows) -> Tensor: ...


def _written(model: nn.Module, paths: Sequence[str], into: dict[str, Tensor]) -> list[Any]:
    """Hooks that note what the modules at `paths` write."""

    def noting(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            into[path] = output

        return hook

    return [model.get_submodule(path).register_forward_hook(noting(path)) for path in paths]


def _mixed(twin: nn.Module, teacher: nn.Module, blocks: Blocks, share: float) -> list[Any]:
    """Hooks by which every block writes share · twin + (1 − share) · original, of the same input."""
    handles = []
    for paths in blocks:
        entered: list[Tensor] = []

        def enter(_: nn.Module, inputs: tuple[Tensor, ...], entered: list[Tensor] = entered) -> None:
            entered[:] = [inputs[0]]

        def leave(
            _: nn.Module, __: Any, output: Tensor, entered: list[Tensor] = entered, paths: tuple[str, ...] = paths
        ) -> Tensor:
            value = entered.pop()
            for path in paths:
                value = teacher.get_submodule(path)(value)
            return share * output + (1 - share) * value

        handles.append(twin.get_submodule(paths[0]).register_forward_pre_hook(enter))
        handles.append(twin.get_submodule(paths[-1]).register_forward_hook(leave))
    return handles


def block_error(found: Tensor, goal: Tensor) -> Tensor:
    """Relative squared error of a block's output, mean over tokens; (…, d). Sinks count as much as other tokens."""
    error = (found.float() - goal.float()).square().sum(-1)
    size = goal.float().square().sum(-1)
    return (error / torch.maximum(size, size.median()).clamp_min(1e-12)).mean()


class EndToEnd:
    """Divergence of the twin's predictions from the original's."""

    def __init__(
        self, accelerator: Any, network: nn.Module, teacher: Any, autocast: Autocast, twin: nn.Module, blocks: Blocks,
        temperature: float = 1.0, match: float = 0.0, blend: float = 0.0, kept: KeptPredictions | None = None,
    ) -> None:  # fmt: skip
        self.accelerator, self.network, self.teacher, self.autocast = accelerator, network, teacher, autocast
        self.temperature, self.match, self.blend, self.kept = temperature, match, blend, kept
        self.done = 0.0  # share of the steps done; the training loop keeps it
        self.twin, self.blocks = twin, blocks
        self.paths = [paths[-1] for paths in blocks] if match else []

    def __call__(self, part: PackedWindows) -> Tensor:
        goals: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        given = part.inputs(self.accelerator.device)

        def predicted(windows: PackedWindows) -> Tensor:
            inputs = windows.inputs(self.accelerator.device)
            with torch.no_grad(), self.autocast(), hooked(_written(self.teacher, self.paths, goals)):
                logits: Tensor = self.teacher(**inputs, use_cache=False).logits
            return logits

        goal = self._goal(part, predicted)
        share = 1.0 if self.done >= self.blend else self.done / self.blend
        mixing = _mixed(self.twin, self.teacher, self.blocks, share) if share < 1 else []
        with hooked(mixing):  # through the backward pass, in which checkpointed layers run again
            with self.autocast(), hooked(_written(self.twin, self.paths, found)):
                logits = self.network(**given, use_cache=False).logits
            loss = kl(goal(logits), logits, self.temperature)
            if self.match:
                loss = loss + self.match * torch.stack([block_error(found[p], goals[p]) for p in self.paths]).mean()
            self.accelerator.backward(loss)
        return loss.detach()

    def _goal(self, part: PackedWindows, predicted: Callable[[PackedWindows], Tensor]) -> Callable[[Tensor], Tensor]:
        """What gives the original's logits, if need be with the twin's help. Windows that come once are not kept."""
        if self.kept is None:
            logits = predicted(part)
            return lambda _: logits
        assert part.numbers is not None
        known, fresh = part.numbers >= 0, part.numbers < 0
        again = part[known]
        likeliest = self.kept(part.numbers[known], lambda: predicted(again)).to(self.accelerator.device)
        if not fresh.any():
            return lambda found: likeliest.completed(found, self.temperature)
        exact = predicted(part[fresh])

        def goal(found: Tensor) -> Tensor:
            logits = torch.empty_like(found, dtype=torch.float32)
            logits[known] = likeliest.completed(found[known], self.temperature)
            logits[fresh] = exact.float()
            return logits

        return goal


class Local:
    """Every block against what the original's block writes; no backward pass through the network."""

    done = 0.0
    unwrapped = True  # gradients do not pass the wrapper that averages them over processes

    def __init__(self, accelerator: Any, teacher: Any, autocast: Autocast, twin: Any, blocks: Blocks) -> None:
        self.accelerator, self.teacher, self.autocast = accelerator, teacher, autocast
        self.twin, self.blocks = twin, blocks

    def __call__(self, part: PackedWindows) -> Tensor:
        goals: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        given = part.inputs(self.accelerator.device)
        last = [paths[-1] for paths in self.blocks]
        with torch.no_grad(), self.autocast(), hooked(_written(self.teacher, last, goals)):
            self.teacher.base_model(**given, use_cache=False)  # with a cache, documents are not kept apart

        def at(paths: tuple[str, ...]) -> Any:
            modules = [self.twin.get_submodule(path) for path in paths]

            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                with torch.enable_grad():
                    value = inputs[0].detach()
                    for module in modules:
                        value = module.forward(value)  # not called: hooks stay out of it
                    loss = block_error(value, goals[paths[-1]]) / len(self.blocks)
                    self.accelerator.backward(loss)
                losses.append(loss.detach())

            return modules[0].register_forward_pre_hook(hook)

        with torch.no_grad(), self.autocast(), hooked([at(paths) for paths in self.blocks]):
            self.twin.base_model(**given, use_cache=False)
        if len(losses) != len(self.blocks):
            raise ModelError(
                "a block runs several times in one forward pass, so that it has no one output to be trained on",
                cause="layers share its weights",
                fix="use the default objective, kl",
            )
        return torch.stack(losses).sum()


class NextToken:
    """Cross-entropy of the text itself."""

    done = 0.0

    def __init__(self, accelerator: Any, network: nn.Module, autocast: Autocast) -> None:
        self.accelerator, self.network, self.autocast = accelerator, network, autocast

    def __call__(self, part: PackedWindows) -> Tensor:
        given = part.inputs(self.accelerator.device)
        with self.autocast():
            logits = self.network(**given, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), given["input_ids"][:, 1:].flatten())
        self.accelerator.backward(loss)
        return loss.detach()
