"""Where a dictionary belongs at a block, found by what it describes, and the block's input and output in its features.

A dictionary may describe what the block reads (behind the norm) or the residual stream before that norm; and what the
block writes or the stream after it. Which one is seen by how much of the variance over the text its reconstruction
explains. With the norm's scale held, a feature's direction d in the stream is γ ⊙ P d in the block's input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.errors import RecipeError
from surgery.reading.activations import Activations
from surgery.reading.block_in_model import BlockInModel, Recorded
from surgery.reading.dictionary import Dictionary, explained_share
from surgery.reading.directions import NormScale

SITES = ("auto", "input", "stream")


@dataclass(frozen=True)
class InputBasis:
    """The block's input in features: x ≈ activations · directions + point.

    Attributes:
        dictionary: what it was encoded by.
        site: input, or stream before the norm.
        explained: R² of the reconstruction over the text, by site.
        activations: (tokens, n), of the site divided by the norm's scale.
        directions: of the block's input, (n, d), float64.
        point: mean of what does not depend on the features, (d,), float64.
        found: the block's input as reconstructed, (tokens, d), float64.
    """

    dictionary: Dictionary
    site: str
    explained: dict[str, float]
    activations: Activations
    directions: Tensor
    point: Tensor
    found: Tensor


@dataclass(frozen=True)
class OutputBasis:
    """What the block writes in features.

    Attributes:
        dictionary: what it was encoded by.
        site: output, or stream after the block.
        explained: R² of the reconstruction over the text, by site.
        activations: (tokens, n).
        rows: what of the block's output each feature counts, (n, out): its encoder's column; of a transcoder, which
            reads the input, the direction it writes.
    """

    dictionary: Dictionary
    site: str
    explained: dict[str, float]
    activations: Activations
    rows: Tensor


def input_basis(
    dictionary: Dictionary, block: BlockInModel, recorded: Recorded, ordinary: Tensor, at: str = "auto"
) -> InputBasis:
    """The block's input in the features of a dictionary.

    Args:
        ordinary: tokens that count, (tokens,), bool.
        at: `input` or `stream` to say what it describes; `auto`: what it explains more of.
    Raises:
        RecipeError: another width; a transcoder; neither is explained at all and `at` is `auto`.
    """
    width = block.polynomial.width
    if dictionary.transcodes:
        raise RecipeError(
            "a transcoder says the block's output, so its features are no basis of the input",
            where=dictionary.name,
            fix="give it as --output-features, and a dictionary of the input as --features",
        )
    _same_width(dictionary, width, "reads")
    if at not in SITES:
        raise RecipeError(f"no place {at!r}", where="--features-at", fix=f"one of {', '.join(SITES)}")
    sites = {"input": recorded.x} | ({} if block.norm is None else {"stream": recorded.stream})
    if at != "auto" and at not in sites:
        raise RecipeError("no norm stands before this block: it reads the stream itself", where="--features-at")
    site, explained = _chosen(dictionary, sites, ordinary, at, "what the block reads", "--features-at input")
    encoded = dictionary.encode(sites[site].nan_to_num(0.0))
    activations, shift, directions = encoded.activations, encoded.shift.double(), dictionary.decoder.double()
    if site == "stream":
        norm, origin, held = held_norm(block, recorded)
        activations = activations.scaled(held)
        directions, shift = norm.of_stream(directions), norm.of_stream(shift) * held[:, None] + origin
    found = activations.times(directions) + shift
    return InputBasis(dictionary, site, explained, activations, directions, shift[ordinary].mean(0), found)


def held_norm(block: BlockInModel, recorded: Recorded) -> tuple[NormScale, Tensor, Tensor]:
    """The norm before a block: γ and P; what it makes of 0, (d,); 1 ÷ the scale it divided each token by, (tokens,)."""
    width = block.polynomial.width
    norm = NormScale.of(block.norm, width)
    if block.norm is None:
        return norm, torch.zeros(width, dtype=torch.float64), torch.ones(len(recorded.x), dtype=torch.float64)
    with torch.no_grad():
        origin = block.norm(torch.zeros(1, width).to(next(block.norm.parameters())))[0].double().cpu()
    wide = norm.of_stream(recorded.stream.double())
    held = ((recorded.x.double() - origin) * wide).sum(-1) / wide.square().sum(-1).clamp_min(1e-300)
    return norm, origin, held.nan_to_num(0.0)


def output_basis(dictionary: Dictionary, block: BlockInModel, recorded: Recorded, ordinary: Tensor) -> OutputBasis:
    """What the block writes in the features of a dictionary.

    Raises:
        RecipeError: another width; neither output nor stream is explained at all.
    """
    out = block.polynomial.out
    if dictionary.transcodes:
        _same_width(dictionary, block.polynomial.width, "reads")
        encoded = dictionary.encode(recorded.x.nan_to_num(0.0))
        guess = dictionary.decode(encoded, recorded.x.nan_to_num(0.0))
        explained = {"output": explained_share(recorded.y[ordinary], guess[ordinary].to(recorded.y))}
        return OutputBasis(dictionary, "output", explained, encoded.activations, dictionary.decoder)
    _same_width(dictionary, out, "writes")
    sites = {"output": recorded.y}
    if not block.normed_after and recorded.stream.shape == recorded.y.shape and block.expert is None:
        sites["stream"] = recorded.stream + recorded.y
    site, explained = _chosen(dictionary, sites, ordinary, "auto", "what the block writes", "")
    encoded = dictionary.encode(sites[site].nan_to_num(0.0))
    return OutputBasis(dictionary, site, explained, encoded.activations, dictionary.encoder.T)


def _same_width(dictionary: Dictionary, width: int, what: str) -> None:
    if dictionary.width != width:
        raise RecipeError(
            f"a dictionary for vectors of {dictionary.width} entries; the block {what} {width}",
            where=dictionary.name,
            cause="it belongs to another model, or to another place in this one",
        )


def _chosen(
    dictionary: Dictionary, sites: dict[str, Tensor], ordinary: Tensor, at: str, what: str, way_out: str
) -> tuple[str, dict[str, float]]:
    """(the site, R² at each)."""
    explained = {}
    for name, vectors in sites.items():
        rows = vectors[ordinary].float()
        explained[name] = explained_share(rows, dictionary.reconstructed(rows))
    if at != "auto":
        return at, explained
    site = max(explained, key=lambda name: explained[name])
    if explained[site] <= 0:
        said = ", ".join(f"{value:.3g} of the {name}" for name, value in explained.items())
        raise RecipeError(
            f"the dictionary does not describe {what}: R² is {said}",
            where=dictionary.name,
            cause="it was trained at another block, or on another model",
            fix=f"give {way_out} to read with it all the same" if way_out else "give the dictionary of this block",
        )
    return site, explained
