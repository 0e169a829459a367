"""What a conversion takes, counted from the shapes of a model: operations, memory, disk.

For every calibration token: the layers but for their blocks once per stream; what the original's block writes; and for
each time a readout is solved the twin's hidden vector and output, and the Gram matrix, of which 10 of 16 tiles are
computed. With descent a forward and a backward pass of the block for every epoch. For every block: Cholesky factors in
float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.blocks.block import Block
from surgery.calibration.mixtures import Mixture
from surgery.calibration.texts import AUTO, SAMPLES
from surgery.conversion.recipe import Recipe
from surgery.fitting.block import FitSettings
from surgery.fitting.either import CACHE_BYTES
from surgery.models import loading
from surgery.runtime.speed import Speed

TILES = 10 / 16
STRENGTHS = 4  # of the ridge that are tried
HELD = 1 / 8  # of the tokens
WAITING = 3  # hidden states of a token in each stream
COPIES = 5  # of a block's maps while they descend: themselves, gradient, two moments and the best
DRAWING = 2  # forward passes that drawing a token takes
BUDGET = 4  # conversions that a budget takes


@dataclass(frozen=True)
class ConversionCost:
    """Operations (additions and multiplications one by one), and bytes.

    Attributes:
        products: operations in what `matmul` says.
        exact, double: in float32 and in float64.
        memory: at the peak: weights, waiting hidden states and the fit of the largest block.
        disk: of the twin.
    """

    products: float
    exact: float
    double: float
    memory: int
    disk: int

    @staticmethod
    def of(network: Any, blocks: Sequence[Block], plan: Recipe) -> ConversionCost:
        """Of a model without weights (on the meta device); `blocks` are those to convert."""
        config = network.config.get_text_config()
        parameters = sum(value.numel() for value in network.parameters())
        embeddings = {id(part.weight): part.weight.numel() for part in _embeddings(network)}
        rest = parameters - sum(block.parameters for block in blocks) - sum(embeddings.values())
        streams = 2 if plan.refit and plan.target == "stream" else 1
        epochs, tokens = plan.epochs_at(plan.degree), plan.tokens
        chosen = getattr(config, "num_experts_per_tok", None) or 1
        products, exact, double = 2.0 * streams * rest * tokens, 0.0, 0.0
        for block in blocks:
            seen = tokens * (min(chosen, block.experts) if block.experts > 1 else 1)
            one = _Fit.of(block, plan, epochs)
            products += one.products * seen
            exact += one.exact * seen + one.sample * block.experts
            double += one.double * block.experts
        drawn = sum(part.share for part in Mixture.of(plan.text).parts if part.source in (SAMPLES, AUTO))
        times = 1 if plan.budget is None else BUDGET
        exact = times * exact + 2.0 * parameters * (DRAWING * drawn * tokens + 2 * plan.measure)
        stored = (
            loading.stored_dtype(Path(plan.model), network.config) if plan.save_dtype == "auto" else plan.save_dtype
        )
        waiting = WAITING * streams * tokens * max((block.width for block in blocks), default=0)
        fits = max((_memory(block, plan, epochs) for block in blocks), default=0)
        memory = 4 * waiting + fits + (0 if plan.offload else 4 * parameters)
        return ConversionCost(times * products, exact, times * double, memory, parameters * _bytes(stored))

    def seconds(self, speed: Speed) -> float:
        """On a machine of this speed, in one process."""
        return self.products / speed.products + self.exact / speed.exact + self.double / speed.double


@dataclass(frozen=True)
class _Fit:
    """Operations of one block: a token's, those of the sample that its units are solved on, and those of the block."""

    products: float
    exact: float
    sample: float
    double: float

    @staticmethod
    def of(block: Block, plan: Recipe, epochs: int) -> _Fit:
        maps, width = block.parameters // block.experts, block.out
        features = block.width if plan.degree == 1 else block.hidden
        solved = (2 if epochs else 1) if plan.refit else 0
        computed = 0 if plan.degree == 1 else maps - block.hidden * width
        gram = TILES * features**2 + features * width
        token = 2.0 * (solved * (computed + gram) + features * width + epochs * HELD * maps)
        sample = 4.0 * maps * min(plan.tokens, FitSettings(plan.degree).unit_tokens)
        factors = solved * (STRENGTHS * features**3 / 3 + 2.0 * features**2 * width)
        return _Fit(2.0 * maps * (solved > 0) + 6.0 * epochs * maps, token, sample, factors)


def _memory(block: Block, plan: Recipe, epochs: int) -> int:
    """Bytes of a block's fit: two matrices in float64, held-out rows, what is kept of a token, maps that descend."""
    features, tokens = block.width if plan.degree == 1 else block.hidden, plan.tokens
    matrices = 16 * features**2 + 4 * min(2 * features, int(HELD * tokens)) * (features + block.out)
    hidden = 4 * tokens * features
    kept = 8 * tokens * block.out * (2 if epochs else 1) + (hidden if hidden <= CACHE_BYTES else 0)
    return matrices + kept + (4 * COPIES * block.parameters // block.experts if epochs else 0)


def _embeddings(network: Any) -> list[Any]:
    found = (getattr(network, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings"))
    return [part for part in found if getattr(part, "weight", None) is not None]


def _bytes(dtype: str) -> int:
    import torch

    size: int = getattr(torch, dtype).itemsize
    return size
