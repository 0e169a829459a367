"""What a conversion takes, counted from the shapes of a model: operations, memory, disk.

For every calibration token: the layers but for their blocks once per stream; what the original's block writes; and for
each time a readout is solved the twin's hidden vector, and the Gram matrix, of which 10 of 16 tiles are computed. With
descent a forward and a backward pass of the block for every epoch. For every block: Cholesky factors in float64. Where
hidden vectors are too many to be kept, and where passes wait inside a block, the block's outputs are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.blocks.block import Block
from surgery.calibration.mixtures import Mixture
from surgery.calibration.texts import SAMPLES
from surgery.conversion.recipe import Recipe
from surgery.fitting.block import FitSettings, beginning_share
from surgery.fitting.either import CACHE_BYTES
from surgery.models import loading
from surgery.runtime.speed import Speed

TILES = 10 / 16
STRENGTHS = 4  # of the ridge that are tried
HELD = 1 / 8  # of the tokens
WAITING = 3  # hidden states of a token in each stream
COPIES = 5  # of a block's maps while they descend: themselves, gradient, two moments and the best
DRAWING = 4  # forward passes that drawing a token takes: one new token at a time, attention reads all earlier ones
BUDGET = 4  # conversions that a budget takes
CHOSEN = ("num_experts_per_tok", "moe_top_k", "top_k_experts", "num_selected_experts")


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
        parameters = sum(value.numel() for value in network.parameters())
        rest = parameters - sum(block.parameters for block in blocks) - _embeddings(network)
        times, chosen = 1 if plan.budget is None else BUDGET, _chosen(network.config.get_text_config())
        fits = [_Fit(block, plan, plan.tokens * min(chosen, block.experts) / block.experts) for block in blocks]
        products, exact, double = 2.0 * _streams(plan) * rest * plan.tokens, 0.0, 0.0
        for fit in fits:
            seen = fit.seen * fit.block.experts
            goes_on = fit is not fits[-1]  # calibration ends at the last
            rounded, unrounded = fit.sampled()
            products += (fit.products() + fit.original_passed() * goes_on) * seen + rounded * fit.block.experts
            exact += (fit.exact() + fit.twin_passed() * goes_on) * seen + unrounded * fit.block.experts
            double += fit.double() * fit.block.experts
        drawn = Mixture.of(plan.text).share(SAMPLES)
        products = times * products + 2.0 * parameters * DRAWING * drawn * plan.tokens
        exact = times * exact + 2.0 * parameters * 2 * plan.measure
        source = loading.stored_dtype(Path(plan.model), network.config)
        stored = source if plan.save_dtype == "auto" else plan.save_dtype
        kept = 0  # with offloading weights and hidden states are in files
        if not plan.offload:
            waiting = WAITING * _streams(plan) * plan.tokens * max((block.width for block in blocks), default=0)
            kept = _bytes("float32" if plan.dtype == "auto" else plan.dtype) * (parameters + waiting)
        memory = kept + max((fit.memory() for fit in fits), default=0)
        twin = parameters + sum(fit.parameters() - fit.block.parameters for fit in fits)
        return ConversionCost(products, exact, times * double, memory, twin * _bytes(stored))

    def seconds(self, speed: Speed) -> float:
        """On a machine of this speed, in one process."""
        return self.products / speed.products + self.exact / speed.exact + self.double / speed.double


@dataclass(frozen=True)
class _Fit:
    """One block's, or one expert's, which sees so many tokens."""

    block: Block
    plan: Recipe
    seen: float

    @property
    def maps(self) -> int:
        """Parameters of the original's maps."""
        return self.block.parameters // self.block.experts

    @property
    def features(self) -> int:
        return self.block.width if self.plan.degree == 1 else self.block.hidden

    @property
    def epochs(self) -> int:
        return self.plan.epochs_at(self.plan.degree)

    @property
    def solved(self) -> int:
        """How often the readout is."""
        return (2 if self.epochs else 1) if self.plan.refit else 0

    @property
    def summed(self) -> float:
        """How often a token is, for that: descent begins from the solution for some, and for all held-out ones."""
        return self.solved - (1 - HELD) * (1 - self.beginning) * bool(self.epochs)

    @property
    def beginning(self) -> float:
        """Share of the tokens that descent's first solution is made of."""
        return beginning_share(self.seen, self.block.hidden) if self.plan.units == 1 else 1.0

    @property
    def first(self) -> int:
        """Parameters of the maps that hidden vectors take; none at degree 1."""
        return 0 if self.plan.degree == 1 else self.maps - self.block.hidden * self.block.out

    @property
    def hidden_kept(self) -> bool:
        """Hidden vectors are, so that the block's outputs come of them."""
        fits = 4 * self.plan.tokens * self.features <= CACHE_BYTES
        return bool(self.solved) and self.block.whole and not self.block.routed and fits

    @property
    def outputs(self) -> int:
        """A token's operations, halved, for what the polynomial writes, where that is computed of hidden vectors."""
        return self.features * self.block.out * self.hidden_kept

    def products(self) -> float:
        """A token's operations in what `matmul` says: what the original writes, the closed form's hidden vectors and
        what it writes, and descent."""
        descent = 4 * self.first + 6 * self.block.hidden * self.block.out  # inputs need no gradient
        closed = 2.0 * ((self.summed - bool(self.epochs)) * self.first + self.outputs * (not self.epochs))
        return 2.0 * self.maps * bool(self.solved) + closed + (1 - HELD) * self.epochs * descent

    def original_passed(self) -> float:
        """A token's operations in the same where passes run the original's block on their way to the next."""
        answered = self.block.whole and not self.block.routed and bool(self.solved)
        return 0.0 if answered else 2.0 * self.maps * (_streams(self.plan) - 1)

    def twin_passed(self) -> float:
        """… in float32 where they run the twin's."""
        return 0.0 if self.hidden_kept else 2.0 * (self.first + self.features * self.block.out)

    def exact(self) -> float:
        """A token's operations in float32: sums; after descent hidden vectors, outputs, looks; what experts should
        add."""
        sums = TILES * self.features**2 + self.features * self.block.out
        descended = (self.first + self.outputs) * bool(self.epochs)
        looks = HELD * (self.epochs // 2 + 2) * self.maps * bool(self.epochs)
        corrections = 2 * self.maps * (self.block.routed and _streams(self.plan) > 1)
        return 2.0 * (self.summed * sums + descended + looks + corrections)

    def sampled(self) -> tuple[float, float]:
        """Operations on the tokens that units are solved on, and that R² is measured on: in what `matmul` says what the
        original writes and its preactivations, in float32 what the polynomial does, where that is not known by then."""
        tokens = min(self.seen, max(FitSettings(self.plan.degree).unit_tokens, 4 * self.block.width))
        return 2.0 * (self.maps + self.first) * tokens, 2.0 * self.maps * tokens * (not self.hidden_kept)

    def double(self) -> float:
        """Operations in float64: factors of the normal equations, solutions, and the spread of each unit."""
        factors = STRENGTHS * self.features**3 / 3 + 4.0 * self.features**2 * self.block.out
        return self.solved * factors + 2.0 * self.first * self.block.width

    def memory(self) -> int:
        """Bytes: two matrices in float64, held-out rows, what is kept of a token, maps that descend."""
        features, tokens, out = self.features, self.plan.tokens, self.block.out
        matrices = 16 * features**2 + 4 * min(2 * features, int(HELD * tokens)) * (features + out)
        kept = 8 * tokens * out * (2 if self.epochs else 1) + 4 * tokens * features * self.hidden_kept
        if self.beginning < 1:  # inputs once more
            kept += round(4 * tokens * (self.beginning + HELD) * self.block.width * bool(self.epochs))
        return matrices + kept + 4 * COPIES * self.maps * bool(self.epochs)

    def parameters(self) -> int:
        """Of the polynomial, or of all experts'; its coefficients and sink units, which are few, are left out."""
        one = self.block.width * self.block.out + self.block.out if self.plan.degree == 1 else self.maps
        return round(one * (self.plan.units if self.plan.degree > 1 else 1)) * self.block.experts


def _streams(plan: Recipe) -> int:
    """Sets of passes, where the blocks' layers are of a known structure."""
    return 2 if plan.refit and plan.target == "stream" else 1


def _chosen(config: Any) -> int:
    """Experts that a token goes to."""
    return next((number for name in CHOSEN if isinstance(number := getattr(config, name, None), int)), 1)


def _embeddings(network: Any) -> int:
    """Parameters of the embeddings and the head, once where they are shared; no pass multiplies by the former, and
    calibration ends before the latter."""
    found = {}
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            weight = getattr(getattr(network, name)(), "weight", None)
        except (AttributeError, NotImplementedError):
            continue
        if weight is not None:
            found[id(weight)] = weight.numel()
    return sum(found.values())


def _bytes(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size
