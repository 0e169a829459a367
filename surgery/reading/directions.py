"""Output directions by name, and what a direction means in tokens.

    token:TEXT        the logit of a token: its unembedding row with the final norm's scale folded in, less the mean
                      over the vocabulary (logits count up to a constant)
    neuron:B.I        the preactivation of hidden unit I of a later block B: its (gate) row, that norm's scale folded in
    coordinate:I      one coordinate of the residual stream
    class:I           a class of a classifier: its row of the last map
    file:PATH         a vector from a .safetensors, .npy or .pt file
    linear:K          the K-th left singular vector of the block's own linear part
    quadratic:K       the K-th of its quadratic part (`Expansion.output_gram`)
    feature:I         a feature of the dictionary of the block's output: what its encoder counts (of a transcoder: what
                      it writes)

A norm divides by a scale that depends on the token and multiplies by γ (LayerNorm takes the mean away first). A
direction e that is read after it, e·norm(r), is read off the stream r by Pᵀ(γ ⊙ e) up to that positive scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.blocks.parts import weight_and_bias
from surgery.closed_form.block_polynomial import Expansion
from surgery.errors import RecipeError, SurgeryError, did_you_mean
from surgery.reading.block_in_model import BlockInModel, find_block, surroundings

KINDS = ("token", "neuron", "coordinate", "class", "file", "linear", "quadratic", "feature")
CHUNK = 4096  # rows of the embedding looked at together


@dataclass(frozen=True)
class Direction:
    """A named direction of a block's output: `vector` (out,), float64, of any length."""

    name: str
    vector: Tensor


@dataclass(frozen=True)
class NormScale:
    """What a norm does to directions that are read after it.

    Attributes:
        scale: γ, (d,); None for no norm at all.
        centres: whether it takes the mean away, as LayerNorm does and RMSNorm does not.
    """

    scale: Tensor | None
    centres: bool

    @staticmethod
    def of(norm: nn.Module | None, width: int) -> NormScale:
        """γ is seen, not looked up: where r has mean 0 and variance 1, norm(r) − norm(0) = γ ⊙ r, whatever the
        parameter is called and whatever is added to it."""
        if norm is None:
            return NormScale(None, False)
        like = next(norm.parameters())
        signs = torch.where(torch.arange(width, device=like.device) % 2 == 0, 1.0, -1.0).to(like)
        signs[width - width % 2 :] = 0  # of an odd number one is left out, and its turn comes after the roll
        shifted, size = signs.roll(1), signs.square().mean().sqrt()
        with torch.no_grad():
            origin, one, two, moved = (norm(value[None])[0] for value in (0 * signs, signs, shifted, signs + 3))
        scale = torch.where(signs != 0, (one - origin) * signs, (two - origin) * shifted) * size
        return NormScale(scale.double(), torch.allclose(moved, one, atol=1e-3 * float(one.abs().max())))

    def of_stream(self, vectors: Tensor) -> Tensor:
        """What vectors of the stream become, up to the positive scale that the norm divides by, (…, d): γ ⊙ P r."""
        if self.scale is None:
            return vectors
        held = vectors - vectors.mean(-1, keepdim=True) if self.centres else vectors
        return held * self.scale.to(vectors)

    def before(self, directions: Tensor) -> Tensor:
        """Directions of the stream before the norm that are read after it as `directions`, (…, d): Pᵀ(γ ⊙ e)."""
        if self.scale is None:
            return directions
        read = directions * self.scale.to(directions)
        return read - read.mean(-1, keepdim=True) if self.centres else read


def check_direction(spec: str) -> tuple[str, str]:
    """(kind, rest) of a direction's name. Raises RecipeError for an unknown kind."""
    kind, separator, rest = spec.partition(":")
    if kind not in KINDS or not separator:
        raise RecipeError(
            f"no output direction {spec!r}{did_you_mean(kind, KINDS)}",
            fix="one of token:TEXT, neuron:BLOCK.UNIT, coordinate:I, class:I, file:PATH, linear:K, quadratic:K, "
            "feature:I",
        )
    return kind, rest


def named_direction(
    spec: str, model: Any, tokenizer: Any, block: BlockInModel, expansion: Expansion, features: Tensor | None = None
) -> Direction:
    """The direction a user named; `features`, (n, out), is what a dictionary of the output counts.

    Raises:
        RecipeError: an unknown kind, an unknown token, a number out of range, a vector of the wrong width.
    """
    kind, rest = check_direction(spec)
    makers: dict[str, Callable[[], Tensor]] = {
        "token": lambda: _token(rest, model, tokenizer, block),
        "neuron": lambda: _neuron(rest, model, block),
        "coordinate": lambda: _one_hot(_number(rest, block.polynomial.out, "coordinates"), block),
        "class": lambda: _class(rest, model),
        "file": lambda: _from_file(Path(rest).expanduser()),
        "linear": lambda: _own(rest, torch.linalg.svd(expansion.jacobian(), full_matrices=False)[0]),
        "quadratic": lambda: _own(rest, torch.linalg.eigh(expansion.output_gram())[1].flip(-1)),
        "feature": lambda: _feature(rest, features),
    }
    vector = makers[kind]().detach().double().cpu()
    if vector.shape != (block.polynomial.out,):
        raise RecipeError(
            f"the direction has shape {tuple(vector.shape)}; the block writes {block.polynomial.out} coordinates",
            where=spec,
        )
    if not bool(torch.isfinite(vector).all()) or not float(vector.norm()):
        raise RecipeError("the direction is zero, or not finite", where=spec)
    return Direction(spec, vector)


def _number(text: str, limit: int, what: str) -> int:
    if not text.isdigit() or int(text) >= limit:
        raise RecipeError(f"{text!r} is not one of the {limit} {what}, 0 to {limit - 1}")
    return int(text)


def _one_hot(index: int, block: BlockInModel) -> Tensor:
    return nn.functional.one_hot(torch.tensor(index), block.polynomial.out).double()


def _feature(text: str, rows: Tensor | None) -> Tensor:
    if rows is None:
        raise RecipeError("feature:I is a feature of a dictionary of the output", fix="name one by --output-features")
    return rows[_number(text.strip(), len(rows), "features")]


def _own(text: str, columns: Tensor) -> Tensor:
    return columns[:, _number(text, columns.shape[1], "directions of the block's own")]


def unembedding(model: Any) -> Tensor | None:
    """The rows that logits are read with, (vocabulary, d); None for a model without."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None else weight_and_bias(head)[0].detach()


def _token(text: str, model: Any, tokenizer: Any, block: BlockInModel) -> Tensor:
    rows = unembedding(model)
    if rows is None or tokenizer is None:
        raise RecipeError("the model has no unembedding, or no tokenizer: it predicts no tokens", fix="use class:I")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = [tokenizer.decode([number]) for number in ids]
        raise RecipeError(
            f"{text!r} is not one token of this model but {len(ids)}: {pieces}",
            cause="most words are one token with the space before them, as in token:' Paris'",
            fix="name one of the pieces",
        )
    return NormScale.of(block.final_norm, rows.shape[1]).before((rows[ids[0]] - rows.mean(0)).double())


def _neuron(text: str, model: Any, block: BlockInModel) -> Tensor:
    number, _, unit = text.partition(".")
    if not number.isdigit() or not unit.isdigit():
        raise RecipeError(f"no neuron {text!r}", fix="give BLOCK.UNIT, as in neuron:13.200")
    if int(number) <= block.index:
        raise RecipeError(
            f"block {number} does not come after block {block.index}: it cannot read what that one writes"
        )
    later = find_block(model, int(number))
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    later = surroundings(model, later, {"input_ids": ids})
    gate = later.polynomial.gate.weight
    row = gate[_number(unit, len(gate), "hidden units")]
    return NormScale.of(later.norm, len(row)).before(row)


def _class(text: str, model: Any) -> Tensor:
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            return head.weight[_number(text, head.out_features, "classes")]
    raise RecipeError("the model has no linear classifier on top", fix="use token:TEXT or file:PATH")


def _from_file(path: Path) -> Tensor:
    if not path.is_file():
        raise RecipeError("there is no such file", where=str(path))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors: list[Tensor] = list(load_file(path).values())
            if len(tensors) != 1:
                raise RecipeError(f"{len(tensors)} tensors instead of one", where=str(path))
            return tensors[0].flatten()
        if path.suffix == ".npy":
            import numpy as np

            return torch.from_numpy(np.load(path)).flatten()
        found = torch.load(path, weights_only=True)
        assert isinstance(found, Tensor)
        return found.flatten()
    except SurgeryError:
        raise
    except Exception as error:
        raise RecipeError(
            f"the direction cannot be read: {error}", where=str(path), fix="give a .safetensors, .npy or .pt vector"
        ) from error


@dataclass(frozen=True)
class Vocabulary:
    """What directions of a block's input mean in tokens; looked through a few thousand tokens at a time, never copied.

    Attributes:
        table: every token's embedding E_t, (vocabulary, d).
        rows: every token's unembedding W_t, (vocabulary, d), or None.
        norm: the norm before the block, or None.
        scale, final: what that norm and the one before the unembedding do to directions.
    """

    tokenizer: Any
    table: Tensor
    rows: Tensor | None
    norm: nn.Module | None
    scale: NormScale
    final: NormScale

    @staticmethod
    def of(model: Any, tokenizer: Any, block: BlockInModel) -> Vocabulary | None:
        """None where the model reads no tokens, or its embeddings are not as wide as the block's input."""
        if tokenizer is None or not hasattr(model, "get_input_embeddings"):
            return None
        table = getattr(model.get_input_embeddings(), "weight", None)
        if table is None or table.shape[1] != block.polynomial.width:
            return None
        width, rows = table.shape[1], unembedding(model)
        if rows is not None and rows.shape[1] != width:
            rows = None
        scales = (NormScale.of(norm, width) for norm in (block.norm, block.final_norm))
        return Vocabulary(tokenizer, table.detach(), rows, block.norm, *scales)

    def inputs(self, covector: Tensor, count: int) -> dict[str, list[dict[str, Any]]]:
        """Tokens whose embedding the block would read as most positive and most negative: e·norm(E_t), in standard
        deviations over the vocabulary."""
        with torch.no_grad():
            seen = (part if self.norm is None else self.norm(part) for part in self.table.split(CHUNK))
            score = torch.cat([part @ covector.to(part) for part in seen])
        return self._ends((score - score.mean()) / score.std().clamp_min(1e-30), count)

    def predictions(self, covector: Tensor, count: int) -> dict[str, list[dict[str, Any]]] | None:
        """Tokens whose logit is read off the stream most like e is: cosine of the two directions."""
        return self._cosines(self.scale.before(covector), count)

    def promoted(self, direction: Tensor, count: int) -> dict[str, list[dict[str, Any]]] | None:
        """Tokens that writing `direction` into the stream makes more and less likely: cosine."""
        return self._cosines(direction, count)

    def _cosines(self, direction: Tensor, count: int) -> dict[str, list[dict[str, Any]]] | None:
        """With every token's logit direction, γ_final ⊙ (W_t − mean)."""
        if self.rows is None or self.rows.shape[1] != len(direction):
            return None
        unit, mean = nn.functional.normalize(direction, dim=0).to(self.rows), self.rows.mean(0)
        logits = (self.final.before(part - mean) for part in self.rows.split(CHUNK))
        return self._ends(torch.cat([nn.functional.normalize(part, dim=-1) @ unit for part in logits]), count)

    def _ends(self, score: Tensor, count: int) -> dict[str, list[dict[str, Any]]]:
        def listed(order: Tensor) -> list[dict[str, Any]]:
            return [{"token": self.tokenizer.decode([int(i)]), "score": round(float(score[i]), 4)} for i in order]

        count = min(count, len(score))
        return {
            "positive": listed(score.topk(count).indices),
            "negative": listed(score.topk(count, largest=False).indices),
        }
