"""How faithful each block is: R² on held-out real activations, next to the figure under the fitted Gaussian.

The original runs over text that no fit has seen; every block's replacement is given the very inputs x that the original
block received, so each figure is about one block alone:

    R² = 1 − Σ‖f(x) − p(x)‖² ÷ Σ‖f(x) − f̄‖²,    FVU = 1 − R²

The same ratio with x drawn from N(μ, Σ), the Gaussian with the activations' own mean and covariance, can differ by a
factor of 50 in FVU: real activations are not Gaussian. The affine baseline is a ridge regression on x, fitted on half
of the windows and scored on the other half, which also chooses its ridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.blocks.block import Block
from surgery.blocks.experts import folded
from surgery.blocks.parts import attribute
from surgery.closed_form import sinks
from surgery.closed_form.moments import InputMoments
from surgery.closed_form.ridge import RidgeSums, ridge_path
from surgery.runtime.hooks import hooked
from surgery.runtime.weights_on_disk import device_of

GAUSSIAN_TOKENS = 2048
AFFINE_RIDGES = (1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
DISAGREEMENT = 2.0  # FVU on text and under the Gaussian further apart than this are pointed out


@dataclass(frozen=True)
class BlockSums:
    """Sums over one block's tokens, without attention sinks; they add over batches and processes.

    Attributes:
        fit, score: of the target f(x) on (x, 1), over even and odd windows; 2 (d + 1)² numbers.
        residual: Σ ‖f(x) − p(x)‖², a scalar.
        sinks, sink_error: number of attention sinks, and the sum of ‖f(x) − p(x)‖ ÷ ‖f(x)‖ there.
    """

    fit: RidgeSums
    score: RidgeSums
    residual: Tensor
    sinks: Tensor
    sink_error: Tensor

    @staticmethod
    def zeros(width: int, out: int) -> BlockSums:
        def empty() -> Tensor:
            return torch.zeros((), dtype=torch.float64)

        return BlockSums(RidgeSums.zeros(width + 1, out), RidgeSums.zeros(width + 1, out), empty(), empty(), empty())

    def __add__(self, other: BlockSums) -> BlockSums:
        return BlockSums(
            self.fit + other.fit,
            self.score + other.score,
            self.residual + other.residual,
            self.sinks + other.sinks,
            self.sink_error + other.sink_error,
        )

    def add_rows(self, x: Tensor, truth: Tensor, found: Tensor, even: Tensor) -> None:
        """Adds tokens: inputs (n, d), both outputs (n, o), and which are of even windows."""
        size, wrong = truth.norm(dim=-1), (found - truth).norm(dim=-1)
        sink = ~sinks.ordinary(size)
        self.sinks.add_(sink.sum().cpu())
        self.sink_error.add_((wrong[sink] / size[sink]).sum().double().cpu())
        self.residual.add_(wrong[~sink].double().square().sum().cpu())
        features = torch.cat([x, x.new_ones(len(x), 1)], dim=-1)
        for part, chosen in ((self.fit, even & ~sink), (self.score, ~even & ~sink)):
            part.add_rows(features[chosen].cpu(), truth[chosen].cpu())


@contextmanager
def _watched(
    model: Any, blocks: Sequence[Block], see: Callable[[Block, tuple[Tensor, ...], Tensor], None]
) -> Iterator[None]:
    entered: dict[str, tuple[Tensor, ...]] = {}
    handles = []

    def enter(block: Block) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, args: entered.__setitem__(block.path, args)

    def leave(block: Block) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        return lambda _, __, output: see(block, entered.pop(block.path), output.detach())

    for block in blocks:
        handles.append(attribute(model, block.entry).register_forward_pre_hook(enter(block)))
        handles.append(attribute(model, block.exit).register_forward_hook(leave(block)))
    with hooked(handles):
        yield


def block_sums(
    original: Any, twin: Any, blocks: Sequence[Block], batches: Iterable[Mapping[str, Tensor]], begin: int = 0
) -> dict[str, BlockSums]:
    """Runs the original over `batches`, and each block's replacement on what the block receives; by block path.

    Args:
        begin: number of the first window among those of all processes.
    """
    sums = {block.path: BlockSums.zeros(block.width, block.out) for block in blocks}
    functions = {block.path: block.function(twin) for block in blocks}

    def see(block: Block, given: tuple[Tensor, ...], output: Tensor) -> None:
        rows = len(next(iter(batch.values())))
        x, truth = given[0].flatten(0, -2), output.flatten(0, -2)
        there = (x, *given[1:]) if block.routed else (x,)
        found = functions[block.path](*(part.to(device_of(twin)) for part in there)).to(x.device)
        if block.routed:
            x, truth, found = (folded(attribute(original, block.path), part) for part in (x, truth, found))
        even = (torch.arange(len(x), device=x.device) // max(1, len(x) // rows) + begin) % 2 == 0
        keep = torch.ones_like(even)
        mask = batch.get("attention_mask")
        if mask is not None and mask.numel() == len(x):
            keep = mask.flatten().bool().to(x.device)
        sums[block.path].add_rows(x[keep].float(), truth[keep].float(), found[keep].float(), even[keep])

    with torch.no_grad(), _watched(original, blocks, see):
        for batch in batches:
            original(**{name: value.to(device_of(original)) for name, value in batch.items()})
            begin += len(next(iter(batch.values())))
    return sums


def block_rows(
    original: Any, twin: Any, blocks: Sequence[Block], sums: Mapping[str, BlockSums], seed: int = 0
) -> list[dict[str, Any]]:
    """One row per block: R² and FVU on text, under the fitted Gaussian, and of the affine baseline."""
    rows = []
    for block in blocks:
        found = sums[block.path]
        whole = found.fit + found.score
        variance = whole.target_square.sum() - whole.cross[-1].square().sum() / whole.weight
        fvu = float(found.residual / variance.clamp_min(1e-300))
        zero = torch.zeros_like(whole.cross)
        affine = ridge_path(found.fit, found.score, zero, ridges=AFFINE_RIDGES).weight
        # Experts are functions of their routing too, which a Gaussian does not have.
        gaussian = None if block.routed else _gaussian_fvu(original, twin, block, whole, seed)
        rows.append(
            {
                "path": block.path, "r2": 1 - fvu, "fvu": fvu, "fvu_gaussian": gaussian,
                "r2_affine": found.score.r2(affine), "tokens": int(whole.weight), "sinks": int(found.sinks),
                "sink_error": float(found.sink_error / found.sinks) if found.sinks else None,
                "gaussian_misleads": gaussian is not None
                and not 1 / DISAGREEMENT < fvu / max(gaussian, 1e-300) < DISAGREEMENT,
            }
        )  # fmt: skip
    return rows


def _gaussian_fvu(original: Any, twin: Any, block: Block, sums: RidgeSums, seed: int) -> float:
    gram = sums.full_gram()
    x = InputMoments(float(sums.weight), gram[-1, :-1], gram[:-1, :-1]).sample(GAUSSIAN_TOKENS, seed)

    def output_of(model: Any) -> Tensor:
        return block.function(model)(x.to(device_of(model), model.dtype)).double().cpu()

    with torch.no_grad():
        truth, found = output_of(original), output_of(twin)
    return float((truth - found).square().sum() / (truth - truth.mean(0)).square().sum().clamp_min(1e-300))
