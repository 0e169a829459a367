"""Attention sinks: the few tokens whose residual stream is a different world.

In many causal models the first token (or a delimiter) carries a massive activation (Sun et al., arXiv 2402.17762).
Counted among the others it ruins the fit; left out, the polynomial must still reproduce what the block writes there.
So sinks are kept out of the moments, and where a block writes the massive activation (or takes it away) each kind of
sink gets one more quadratic unit that points at it,

    (a·(x − μ))²,   a ∝ Σ⁻¹ (x_sink − μ),   a·(x_sink − μ) = 1,

Fisher's direction: 1 at the sink and, since the sink's Mahalanobis distance is large, next to 0 elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.closed_form.forms import Affine
from surgery.closed_form.moments import InputMoments

MASSIVE = 5.0  # a residual stream this many times the median may be a sink's (Gemma 3 270M: 5 to 27)
SURELY = 20.0  # … and this many times, where the model's sinks are far larger (SmolLM2: 160 to 180)
BELOW_LARGEST = 10.0  # a sink is at least the model's largest divided by this
OUTLYING = 20.0  # the same of a block's output, which differs more between ordinary tokens
MOST_SINKS = 0.02  # of all tokens; more than that are no exception but the distribution
SAME_KIND = 0.8  # cosine between x − μ of two sinks that share a unit
MOST_KINDS = 4
SMALLEST_KIND = 0.25  # share of the sinks that must be alike
SHRINKAGE = 1e-3  # of the mean variance, added to Σ
WRITER = 0.15  # share of the residual stream's norm at a sink that a block must write to get a unit for it


def ordinary(sizes: Tensor) -> Tensor:
    """Which norms of outputs, (tokens,), are no sink's, bool: all up to 20 times the median. NaN is none of them."""
    return sizes <= OUTLYING * sizes.nanmedian()


def limit_of(largest: float) -> float:
    """From how many times the median norm on a token of a model counts as a sink.

    A tenth of the model's largest, at least 5 and at most 20: some models have tokens that are large for a few layers
    and ordinary again, and where sinks are a hundred times the median those are none.

    Args:
        largest: norm of the model's sinks over the median norm, at the layer where that is largest.
    """
    return min(SURELY, max(MASSIVE, largest / BELOW_LARGEST))


def threshold(sizes: Tensor, times: float = MASSIVE) -> float:
    """Norm from which on a token counts as a sink, `times` the median; infinite where too many would."""
    limit = times * float(sizes.median())
    return limit if float((sizes > limit).double().mean()) <= MOST_SINKS else float("inf")


def written(size: Tensor, norms: Tensor) -> bool:
    """Whether the block itself writes what makes its sinks massive (or takes it away), rather than passing it on.

    Args:
        size: norms of the residual stream at the sinks, before the block.
        norms: of what the block adds to it there.
    """
    return bool(len(norms)) and float((norms / (norms + size)).median()) > WRITER


def directions(inputs: InputMoments, at_sinks: Tensor) -> Affine:
    """The units that point at the sinks: rows a and biases −a·μ, one per kind of sink.

    Args:
        inputs: moments of the block's input at ordinary tokens.
        at_sinks: block inputs at the sinks, (number of sinks, d); may be empty.
    """
    d = len(inputs.total)
    mean, covariance = inputs.mean, inputs.covariance
    found = _kinds(at_sinks.double() - mean)
    if not found:
        return Affine(mean.new_zeros(0, d), mean.new_zeros(0))
    centres = torch.stack(found)
    shrunk = covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(d).to(covariance)
    pointing = torch.cholesky_solve(centres.T, torch.linalg.cholesky(shrunk)).T
    rows = pointing / (pointing * centres).sum(-1, keepdim=True)
    return Affine(rows, -(rows @ mean))


def _kinds(away: Tensor) -> list[Tensor]:
    """Means of the groups of similar sinks, given x − μ; sinks too various to be pointed at get no unit."""
    centres: list[Tensor] = []
    total = len(away)
    while len(away) and len(centres) < MOST_KINDS:
        alike = torch.nn.functional.cosine_similarity(away, away[:1], dim=-1) > SAME_KIND
        if int(alike.sum()) >= SMALLEST_KIND * total:
            centres.append(away[alike].mean(0))
        away = away[~alike]
    return centres
