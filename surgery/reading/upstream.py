"""Which features of an earlier block write into what a block reads: the direct path through the residual stream.

A feature k of an earlier block's output adds c a_k D_k to the stream, with c = 1 in most models. With the norm before
the later block held at its mean scale s̄ over the text, that moves the block's input by c a_k γ ⊙ P D_k ÷ s̄, and so e·x
along an eigenvector e, or the preactivation of a feature of the input. What attention and the blocks between make of it
is not in it. c is seen in a run: what arrives of a small change, at the same token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import RecipeError
from surgery.reading.activity import Activity, examples
from surgery.reading.block_in_model import BlockInModel, Recorded, recorded_activity
from surgery.reading.dictionary import Dictionary, read_dictionary
from surgery.reading.feature_basis import InputBasis, OutputBasis, held_norm, output_basis
from surgery.runtime.hooks import hooked

WRITERS = 5  # features of the earlier block that are shown for each thing that is read
SMALL = 0.03  # of a token's output: the change whose arrival is looked at
LEAST_COSINE = 0.5  # with what arrives of it


@dataclass(frozen=True)
class Upstream:
    """An earlier block and the dictionary of what it writes, as named by BLOCK=PATH."""

    block: int
    dictionary: Dictionary

    @staticmethod
    def read(spec: str | None, later: int) -> Upstream | None:
        """Raises RecipeError for what is not BLOCK=PATH, or a block that is no earlier one."""
        if spec is None:
            return None
        number, _, path = spec.partition("=")
        if not number.isdigit() or not path:
            raise RecipeError(f"no earlier block {spec!r}", where="--upstream", fix="give BLOCK=PATH, as in 11=saes/11")
        if int(number) >= later:
            raise RecipeError(f"block {number} does not come before block {later}", where="--upstream")
        return Upstream(int(number), read_dictionary(path))


def carried_to(model: Any, earlier: BlockInModel, later: BlockInModel, ids: Tensor) -> float:
    """c: what of a small random change of the earlier block's output arrives in the later one's stream, at the last
    token of each row of `ids`.

    Raises:
        RecipeError: what arrives points elsewhere, as behind norms within the stream.
    """
    probe = {"input_ids": ids}
    written = recorded_activity(model, earlier, [probe]).y.view(*ids.shape, -1)[:, -1]
    drawn = torch.randn(written.shape, generator=torch.Generator().manual_seed(0)).to(written)
    bump = drawn * (SMALL * written.norm(dim=-1) / drawn.norm(dim=-1))[:, None]

    def add(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        moved = output.clone()
        moved.view(*ids.shape, -1)[:, -1] += bump.to(output)
        return moved

    before = recorded_activity(model, later, [probe]).stream
    with hooked([earlier.exit.register_forward_hook(add)]):
        after = recorded_activity(model, later, [probe]).stream
    arrived = (after - before).view(*ids.shape, -1)[:, -1]
    cosine = float(torch.cosine_similarity(arrived, bump, dim=-1).mean())
    if not cosine > LEAST_COSINE:
        raise RecipeError(
            f"what block {earlier.index} writes does not reach block {later.index} as it is (cosine {cosine:.2f})",
            where="--upstream",
            cause="norms stand within the residual stream, or the blocks are far apart",
        )
    return float((arrived * bump).sum() / bump.square().sum())


@dataclass(frozen=True)
class Writers:
    """What an earlier block's features move in a later block's input.

    Attributes:
        basis: the earlier block's output in features.
        moved: what each moves the later block's input by where it fires at its usual size, (n, d), float64.
        stream: the same of the stream before the norm, (n, d), float64.
        seen: the later block over the text.
        number: the earlier block's.
    """

    basis: OutputBasis
    moved: Tensor
    stream: Tensor
    seen: Activity
    number: int

    @staticmethod
    def of(
        upstream: Upstream,
        earlier: BlockInModel,
        wrote: Recorded,
        block: BlockInModel,
        recorded: Recorded,
        seen: Activity,
        carried: float,
    ) -> Writers:
        """`carried`: c, by :func:`carried_to`.

        Raises RecipeError where the dictionary does not describe what the earlier block writes.
        """
        basis = output_basis(upstream.dictionary, earlier, wrote, seen.ordinary)
        usual = basis.activations.on(seen.ordinary).usual().double()
        stream = carried * upstream.dictionary.decoder.double() * usual[:, None]
        norm, _, held = held_norm(block, recorded)
        return Writers(basis, norm.of_stream(stream) * held[seen.ordinary].mean(), stream, seen, upstream.block)

    def into(self, covector: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
        """The features that move e·x most, for a covector e of the block's input, (d,)."""
        return self._strongest(self.moved @ covector, self.seen.x @ covector, tokenizer)

    def into_feature(self, inputs: InputBasis, number: int, tokenizer: Any) -> list[dict[str, Any]]:
        """The features that move the preactivation of a feature of the later block's input most."""
        encoder = inputs.dictionary.encoder[:, number].double()
        moves = (self.moved if inputs.site == "input" else self.stream) @ encoder
        return self._strongest(moves, inputs.activations.column(number), tokenizer)

    def _strongest(self, moves: Tensor, values: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
        """Each with what it moves, in standard deviations of `values`, and how both go together over the text."""
        rows, spread = self.seen.ordinary, values[self.seen.ordinary].std().clamp_min(1e-300)
        found = []
        for number in moves.abs().topk(min(WRITERS, len(moves))).indices.tolist():
            a = self.basis.activations.column(number)
            if not bool((a[rows] != 0).any()):
                break
            both = torch.stack((a[rows], values[rows]))
            found.append(
                {
                    "feature": number,
                    "moves": float(moves[number] / spread),
                    "correlation": float(torch.corrcoef(both)[0, 1].nan_to_num(0.0)),
                    "fires": float((a[rows] != 0).double().mean()),
                    "contexts": examples(self.seen, a, tokenizer, 2),
                }
            )
        return found
