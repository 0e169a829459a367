"""A block read in the features of sparse dictionaries: which two input features together write a direction."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.errors import RecipeError
from surgery.reading.activations import Activations
from surgery.reading.activity import Activity, examples
from surgery.reading.block_in_model import BlockInModel, Recorded
from surgery.reading.dictionary import Dictionary, read_dictionary
from surgery.reading.directions import Direction, Vocabulary
from surgery.reading.feature_basis import SITES, InputBasis, OutputBasis, input_basis, output_basis
from surgery.reading.interactions import RANKS, Agreement, FeatureForm, Terms, curve, strongest, written
from surgery.reading.upstream import Writers

DRAWN = 16  # features in the heat map
LEAST_FIRING = 8  # tokens that an output feature fires on to be listed


@dataclass(frozen=True)
class Dictionaries:
    """What was named: dictionaries of the block's input and output, either None; and how they are used.

    Attributes:
        at: what the input's dictionary describes, one of `SITES`.
        rank: what makes a term strong, one of `RANKS`.
        count: terms, or output features, to show.
    """

    inputs: Dictionary | None
    outputs: Dictionary | None
    at: str
    rank: str
    count: int

    @staticmethod
    def read(features: str | None, output_features: str | None, at: str, rank: str, count: int) -> Dictionaries:
        """From their files. Raises RecipeError for what cannot be read, and for settings that nothing would use."""
        if rank not in RANKS:
            raise RecipeError(f"no rank {rank!r}", where="--rank", fix=f"one of {', '.join(RANKS)}")
        if at not in SITES:
            raise RecipeError(f"no place {at!r}", where="--features-at", fix=f"one of {', '.join(SITES)}")
        if features is None and (at, rank) != (SITES[0], RANKS[0]):
            raise RecipeError(
                "--rank and --features-at are for a dictionary of the input", fix="name one by --features"
            )
        inputs, outputs = (None if path is None else read_dictionary(path) for path in (features, output_features))
        return Dictionaries(inputs, outputs, at, rank, count)


@dataclass(frozen=True)
class FeatureReader:
    """Turns directions into terms of features, for one block over one text.

    Attributes:
        fitted, judged: tokens that terms are ranked on, and other ones that judge them, (tokens,), bool.
    """

    asked: Dictionaries
    polynomial: BlockPolynomial
    recorded: Recorded
    seen: Activity
    inputs: InputBasis | None
    outputs: OutputBasis | None
    vocabulary: Vocabulary | None
    tokenizer: Any
    fitted: Tensor
    judged: Tensor
    writers: Writers | None = None

    @staticmethod
    def of(
        asked: Dictionaries,
        block: BlockInModel,
        recorded: Recorded,
        seen: Activity,
        vocabulary: Vocabulary | None,
        tokenizer: Any,
        writers: Writers | None = None,
    ) -> FeatureReader:
        """Raises RecipeError where a dictionary is of another width, or describes nothing here."""
        inputs = None if asked.inputs is None else input_basis(asked.inputs, block, recorded, seen.ordinary, asked.at)
        outputs = None if asked.outputs is None else output_basis(asked.outputs, block, recorded, seen.ordinary)
        odd = torch.arange(len(seen.x)) // seen.ids.shape[1] % 2 == 1
        fitted, judged = seen.ordinary & ~odd, seen.ordinary & odd
        if int(judged.sum()) < 2:  # a single window
            fitted = judged = seen.ordinary
        return FeatureReader(
            asked, block.polynomial, recorded, seen, inputs, outputs, vocabulary, tokenizer, fitted, judged, writers
        )

    def direction(self, direction: Direction) -> dict[str, Any]:
        """{"features": …}: the terms that write one output direction, strongest first, and how well they tell it on
        other text; {} without a dictionary of the input."""
        if self.inputs is None:
            return {}
        basis, w = self.inputs, direction.vector / direction.vector.norm()
        form = FeatureForm.of(self.polynomial.expand(basis.point), w, basis.directions)
        terms = strongest(form, basis.activations, self.fitted, by=self.asked.rank)
        value = self.polynomial(self.seen.x) @ w
        whole = Agreement.of(value[self.judged], (self.polynomial(basis.found[self.judged]) @ w))
        alone, together = terms.split(self.asked.count)
        shown = list(dict.fromkeys([*_features(together), *_features(alone)]))
        drawn = shown[:DRAWN]
        told = curve(form, terms, basis.activations, value, self.fitted, self.judged)
        rows = [_rows(form, part, basis.activations, self.seen.ordinary) for part in (alone, together)]
        found = {
            "input": self._input(basis),
            "output": None if self.outputs is None else self._output(self.outputs, direction.name),
            "rank": self.asked.rank,
            "judged_on": int(self.judged.sum()),
            "same_text": bool((self.fitted == self.judged).all()),
            "constant": form.constant,
            "alone": rows[0],
            "together": rows[1],
            "curve": [{"terms": number, **asdict(agreement)} for number, agreement in told],
            "whole": asdict(whole),
            "described": {str(number): self._described(basis, number) for number in shown},
            "map": {"features": drawn, "strength": self._map(form, basis.activations.on(self.fitted), drawn)},
        }
        return {"features": found}

    def survey(self) -> dict[str, Any]:
        """{"features": …}: the output features that the input features tell best, on the judging text; {} without
        dictionaries."""
        found: dict[str, Any] = {} if self.inputs is None else {"input": self._input(self.inputs)}
        if self.outputs is None:
            return {"features": found} if found else {}
        outputs = self.outputs
        found["output"] = self._output(outputs, "")
        fires = outputs.activations.on(self.seen.ordinary).counts()
        listed = fires >= LEAST_FIRING
        told: Tensor | None = None
        if self.inputs is not None:
            y = self.polynomial(self.seen.x[self.judged]).float()
            guess = self.polynomial(self.inputs.found[self.judged]).float()
            value, other = (part @ outputs.rows.T for part in (y, guess))
            told = 1 - (value - other).square().sum(0) / (value - value.mean(0)).square().sum(0).clamp_min(1e-30)
        order = (fires.float() if told is None else told).masked_fill(~listed, -torch.inf)
        numbers = order.topk(min(self.asked.count, int(listed.sum()))).indices.tolist()
        found["list"] = [self._listed(outputs, number, told, fires) for number in numbers]
        return {"features": found}

    def _input(self, basis: InputBasis) -> dict[str, Any]:
        fires = basis.activations.on(self.seen.ordinary).counts()
        firing = float(fires.sum()) / int(self.seen.ordinary.sum())
        return _named(basis) | {"firing": firing, "silent": int((fires == 0).sum())}

    def _output(self, basis: OutputBasis, named: str) -> dict[str, Any]:
        kind, _, number = named.partition(":")
        if kind != "feature" or not number.strip().isdigit():
            return _named(basis)
        values = basis.activations.column(int(number))
        return _named(basis) | {
            "feature": int(number),
            "fires": float((values[self.seen.ordinary] > 0).double().mean()),
            "contexts": examples(self.seen, values, self.tokenizer, 4) if bool((values > 0).any()) else [],
        }

    def _map(self, form: FeatureForm, activations: Activations, drawn: list[int]) -> list[list[float]]:
        """What two features write together where both fire at their usual strength; alone on the diagonal."""
        at = torch.tensor(drawn, dtype=torch.long)
        usual = activations.usual()[at].double()
        found = 2 * form.read[at] @ form.directions[at].T * usual[:, None] * usual
        alone = form.linear[at] * usual + form.square[at] * usual**2
        return (found - found.diag().diag() + alone.diag()).tolist()

    def _described(self, basis: InputBasis, number: int) -> dict[str, Any]:
        values = basis.activations.column(number)
        covector, count = basis.directions[number], 5
        vocabulary = self.vocabulary
        return {
            "fires": float((values[self.seen.ordinary] != 0).double().mean()),
            "embedding": None if vocabulary is None else vocabulary.inputs(covector, count),
            "unembedding": None if vocabulary is None else vocabulary.predictions(covector, count),
            "contexts": examples(self.seen, values, self.tokenizer, 3) if bool((values > 0).any()) else [],
            **({} if self.writers is None else {"upstream": self.writers.into_feature(basis, number, self.tokenizer)}),
        }

    def _listed(self, basis: OutputBasis, number: int, told: Tensor | None, fires: Tensor) -> dict[str, Any]:
        wrote = basis.dictionary.decoder[number].double()
        values = basis.activations.column(number)
        return {
            "name": f"feature:{number}",
            "fires": float(fires[number]) / max(int(self.seen.ordinary.sum()), 1),
            "r2": None if told is None else float(told[number]),
            "promotes": None if self.vocabulary is None else self.vocabulary.promoted(wrote, 8),
            "contexts": examples(self.seen, values, self.tokenizer, 2),
        }


def _named(basis: InputBasis | OutputBasis) -> dict[str, Any]:
    """Which dictionary, and what it describes how well."""
    own = basis.dictionary
    return {"name": own.name, "size": own.size, "kind": own.kind, "site": basis.site, "r2": basis.explained}


def _features(terms: Terms) -> list[int]:
    """Of each term in turn."""
    return [int(number) for number in torch.stack((terms.first, terms.second), 1).flatten()]


def _rows(form: FeatureForm, terms: Terms, activations: Activations, ordinary: Tensor) -> list[dict[str, Any]]:
    """Each with its weight, strength and share; on how many tokens it acts, and what it writes there on average."""
    values = torch.cat([torch.zeros(activations.tokens, 0), *written(form, terms, activations)], -1)
    first, second = (activations.columns(part) != 0 for part in (terms.first, terms.second))
    rows = []
    for place, (i, j) in enumerate(zip(terms.first.tolist(), terms.second.tolist(), strict=True)):
        acts = first[:, place] & second[:, place] & ordinary
        row = {"features": [i, j], "weight": float(terms.weight[place])}
        if i == j:
            row = {"features": [i], "linear": float(form.linear[i]), "square": float(terms.weight[place])}
        row |= {"strength": float(terms.strength[place]), "share": float(terms.share[place]), "tokens": int(acts.sum())}
        rows.append(row | {"mean": float(values[acts, place].mean()) if bool(acts.any()) else 0.0})
    return rows
