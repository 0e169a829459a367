"""The whole explanation of one block in one place: load → find → activity → expand → spectrum → read."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.inputs import Calibration, calibration_inputs
from surgery.closed_form.block_polynomial import Expansion
from surgery.conversion.pipeline import convert
from surgery.errors import RecipeError, SurgeryError
from surgery.models import loading
from surgery.reading.activity import Activity, examples
from surgery.reading.block_in_model import BlockInModel, NotATwinError, find_block, recorded_activity, surroundings
from surgery.reading.directions import KINDS, Direction, Vocabulary, check_direction, named_direction
from surgery.reading.features import Dictionaries, FeatureReader
from surgery.reading.page import write_explanation
from surgery.reading.spectrum import Spectrum, spectrum
from surgery.reading.upstream import Upstream, Writers, carried_to
from surgery.runtime.settings import at_least, checked_settings
from surgery.runtime.vocabulary import understands_former_names

FORMAT = 1
COORDINATES = ("raw", "data")
FIT_TOKENS = 16384  # calibration tokens where a block is fitted on the fly


@dataclass(frozen=True)
class ExplainSettings:
    """What `surgery explain` does; the options of the same names.

    Attributes:
        twin: Hub id, folder or .gguf file.
        block, expert: its number, as `surgery inspect` counts; and which expert of it, where it is a mixture.
        direction: of its output (see :mod:`surgery.reading.directions`); None for a survey of its own.
        minus: a direction to subtract, as in the difference of two logits.
        pairs: eigenpairs to show.
        coordinates: `raw` for the eigenpairs of Γ itself, `data` for those of Σ^½ Γ Σ^½ (shares are then of the
            variance that the quadratic part has under N(μ, Σ)).
        text, tokens, window: what drives them: a text source, how much of it, in windows of how many tokens.
        words, contexts: tokens and contexts to show for each.
        fit: fit the block now, where it is not a polynomial yet, at this degree; None: do not.
        features, output_features: sparse dictionaries of the block's input and output to read it in (see
            :mod:`surgery.reading.dictionary`).
        features_at: what the first describes: the block's `input` or the `stream` before its norm; auto: what it
            explains more of.
        upstream: BLOCK=PATH, an earlier block and a dictionary of its output: which of its features write into what
            this block reads along the direction.
        terms: features and pairs of features to show.
        rank: what makes them strong: what they write over the `text`, or their `weights` alone.
    """

    twin: str
    block: int = at_least(0)
    direction: str | None = None
    minus: str | None = None
    pairs: int = at_least(1, 6)
    coordinates: str = "raw"
    text: str = "python"
    tokens: int = at_least(2, 4096)
    window: int = at_least(2, 256)
    words: int = at_least(0, 8)
    contexts: int = at_least(0, 4)
    fit: int | None = at_least(2, None)
    expert: int | None = at_least(0, None)
    features: str | None = None
    output_features: str | None = None
    features_at: str = "auto"
    upstream: str | None = None
    terms: int = at_least(1, 12)
    rank: str = "text"
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0


@understands_former_names
def explain(
    twin: str | Path,
    block: int,
    *,
    direction: str | None = None,
    output: str | Path | None = None,
    quiet: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Reads one block of a twin: which inputs make it write a direction, by the eigenpairs of its quadratic part.

    Args:
        twin: Hub id, folder or .gguf file.
        block: its number, as `surgery inspect` counts.
        direction: of the block's output (see :mod:`surgery.reading.directions`), a vector of its width; None surveys
            the block's own.
        output: folder for explanation.json, explanation.html and spectrum.png.
        settings: the other fields of :class:`ExplainSettings`.
    Returns:
        what explanation.json holds: shares of variance, eigenvalues, tokens and contexts.
    Raises:
        SurgeryError: not a twin, no such block, an unknown direction, too little text.
    """
    if str(output).partition(":")[0] in KINDS and not Path(str(output)).exists():
        raise RecipeError(
            f"{str(output)!r} is a direction, not a folder", where="--output", fix="give --direction for it"
        )
    given = {**settings, "twin": str(twin), "block": block, "direction": direction}
    found = explained(checked_settings(ExplainSettings, given), quiet)
    if output is not None:
        write_explanation(found, Path(output))
    return found


def explained(settings: ExplainSettings, quiet: bool = True) -> dict[str, Any]:
    """The explanation as data, for settings that were checked."""
    started = time.monotonic()
    if settings.minus and not settings.direction:
        raise RecipeError("--minus needs a --direction to be subtracted from")
    for named in filter(None, (settings.direction, settings.minus)):
        check_direction(named)
    if settings.coordinates not in COORDINATES:
        raise RecipeError(f"no coordinates {settings.coordinates!r}", fix=f"one of {', '.join(COORDINATES)}")
    asked = Dictionaries.read(
        settings.features, settings.output_features, settings.features_at, settings.rank, settings.terms
    )
    upstream = Upstream.read(settings.upstream, settings.block)
    if upstream and not settings.direction:
        raise RecipeError("--upstream needs a --direction, whose readers it follows back")
    loaded = loading.loaded(settings.twin, settings.revision, settings.dtype)
    block, inputs = _block(settings, loaded, quiet)
    model: Any = loaded.model
    if not all("input_ids" in batch for batch in inputs.batches):
        raise SurgeryError("only models that read tokens are explained with text", where=settings.twin)
    ids = torch.cat([batch["input_ids"] for batch in inputs.batches])
    probe = {name: value[:1, :8] for name, value in inputs.batches[0].items()}
    block = surroundings(model, block, probe)
    model.to(loading.placed(settings.device))
    recorded = recorded_activity(model, block, inputs.batches, quiet)
    seen = Activity.of(ids, recorded.x, recorded.size)
    writers = None
    if upstream is not None:
        earlier = surroundings(model, find_block(model, upstream.block), probe)
        wrote = recorded_activity(model, earlier, inputs.batches, quiet)
        carried = carried_to(model, earlier, block, ids[:8, :16].to(model.device))
        writers = Writers.of(upstream, earlier, wrote, block, recorded, seen, carried)
    model.to("cpu")
    expansion = block.polynomial.expand(seen.mean)
    vocabulary = Vocabulary.of(model, loaded.tokenizer, block)
    report: dict[str, Any] = {
        "format": FORMAT,
        "settings": asdict(settings) | _public(settings),
        "model": loaded.source.as_dict(),
        "block": {
            "index": block.index, "path": block.path, "expert": block.expert, "degree": block.polynomial.degree,
            "width": block.polynomial.width, "hidden": len(block.polynomial.gate.bias), "out": block.polynomial.out,
        },
        "text": inputs.as_dict() | {"source": _public(settings)["text"], "left_out": int((~seen.ordinary).sum())},
        "notes": _notes(block, settings),
    }  # fmt: skip
    reader = _Reader(settings, seen, expansion, vocabulary, loaded.tokenizer)
    features = FeatureReader.of(asked, block, recorded, seen, vocabulary, loaded.tokenizer, writers)
    if settings.direction is None:
        report |= reader.own_directions() | features.survey()
    else:
        rows = None if features.outputs is None else features.outputs.rows
        direction = named_direction(settings.direction, model, loaded.tokenizer, block, expansion, rows)
        if settings.minus:
            less = named_direction(settings.minus, model, loaded.tokenizer, block, expansion, rows)
            direction = Direction(f"{direction.name} − {less.name}", direction.vector - less.vector)
        report |= reader.direction(direction, writers) | features.direction(direction)
    return report | {"seconds": round(time.monotonic() - started, 2)}


def _block(settings: ExplainSettings, loaded: loading.LoadedModel, quiet: bool) -> tuple[BlockInModel, Calibration]:
    """The block as a polynomial (fitted now, if asked for and not one yet), and the text as model inputs."""
    model: Any = loaded.model

    def inputs() -> Calibration:
        much = {"tokens": settings.tokens, "length": settings.window, "batch": 8, "seed": settings.seed}
        return calibration_inputs(settings.text, model, loaded.text_tokenizer, **much)

    try:
        found = find_block(model, settings.block, settings.expert)
        if found.polynomial.degree < 2:
            raise RecipeError("the block is affine: it has no quadratic part", where=found.path)
        return found, inputs()
    except (NotATwinError, RecipeError):
        if settings.fit is None:
            raise
    recipe: dict[str, Any] = {
        "degree": settings.fit,
        "blocks": str(settings.block),
        "tokens": max(FIT_TOKENS, settings.tokens),
    }
    recipe |= {"text": settings.text, "measure": 0, "form": "custom", "seed": settings.seed}
    convert(model, tokenizer=loaded.tokenizer, quiet=quiet, **recipe)
    return find_block(model, settings.block, settings.expert), inputs()


def _public(settings: ExplainSettings) -> dict[str, str]:
    """Local paths by their last part: a page is for showing."""
    names = {key: getattr(settings, key) for key in ("twin", "text", "features", "output_features", "upstream")}
    given = {key: name for key, name in names.items() if name is not None}
    return {key: Path(name).name if Path(name).expanduser().exists() else name for key, name in given.items()}


def _notes(block: BlockInModel, settings: ExplainSettings) -> list[str]:
    notes = []
    if block.normed_after:
        notes.append("The block's output is normalised before it joins the stream; the direction is taken before that.")
    if block.norm is None:
        notes.append("No norm stands before the block; tokens are read from the raw embeddings.")
    if settings.coordinates == "data":
        notes.append(
            "Eigenpairs are those of Σ^½ Γ Σ^½, with Σ the covariance of the block's input on this text: each "
            "direction has unit variance, and λ² ÷ ‖·‖² is its share of the quadratic part's variance under N(μ, Σ)."
        )
    return notes


@dataclass(frozen=True)
class _Reader:
    """Turns directions into what a person reads."""

    settings: ExplainSettings
    seen: Activity
    expansion: Expansion
    vocabulary: Vocabulary | None
    tokenizer: Any

    def direction(self, direction: Direction, writers: Writers | None = None) -> dict[str, Any]:
        """One output direction: parts, spectrum, eigenpairs, and who writes into these."""
        w = direction.vector / direction.vector.norm()
        linear, quadratic, higher = self.expansion.parts(w, self.seen.x)
        whole = linear + quadratic + higher
        root, inverse = self.seen.roots() if self.settings.coordinates == "data" else (None, None)
        found = spectrum(self.expansion.quadratic(w, root), self.settings.pairs)
        return {
            "direction": {
                "name": direction.name,
                "norm": float(direction.vector.norm()),
                "promotes": None if self.vocabulary is None else self.vocabulary.promoted(w, self.settings.words),
            },
            "parts": self._shares(linear, quadratic, higher) | {"constant": float(self.expansion.constant @ w)},
            "contexts": examples(self.seen, whole, self.tokenizer, self.settings.contexts),
            "linear": self._linear(w, linear),
            "spectrum": {
                "effective_rank": found.effective_rank,
                "square": found.square,
                "trace": found.trace,
                "explained": float(found.shares.sum()),
            },
            "eigenpairs": [self._pair(found, inverse, number, writers) for number in range(len(found.values))],
        }

    def _shares(self, *parts: Tensor) -> dict[str, Any]:
        """Standard deviation of the whole, and each part's covariance with it as a share of its variance."""
        rows = torch.stack(parts)[:, self.seen.ordinary]
        rows = rows - rows.mean(-1, keepdim=True)
        whole = rows.sum(0)
        variance = float(whole.square().mean())
        shares = [float((row * whole).mean()) / max(variance, 1e-300) for row in rows]
        return dict(zip(("linear", "quadratic", "higher"), shares, strict=True)) | {"deviation": variance**0.5}

    def _linear(self, w: Tensor, values: Tensor) -> dict[str, Any]:
        covector = self.expansion.linear(w)
        return {"norm": float(covector.norm()), **self._tokens(covector)} | {
            "contexts": examples(self.seen, values, self.tokenizer, 1)
        }

    def _pair(self, found: Spectrum, inverse: Tensor | None, number: int, writers: Writers | None) -> dict[str, Any]:
        vector, value = found.vectors[:, number], found.values[number]
        covector = vector if inverse is None else inverse @ vector
        position = (self.seen.x - self.seen.mean) @ covector
        ordinary = position[self.seen.ordinary]
        if float(ordinary.pow(3).sum()) < 0:  # the end with the stronger contexts is the positive one
            covector, position, ordinary = -covector, -position, -ordinary
        contribution = value * position.square()
        return {
            "value": float(value),
            "share": float(found.shares[number]),
            "mean_contribution": float(contribution[self.seen.ordinary].mean()),
            "kurtosis": float(ordinary.pow(4).mean() / ordinary.square().mean().square().clamp_min(1e-300)),
            **self._tokens(covector),
            "contexts": {
                "positive": examples(self.seen, position, self.tokenizer, self.settings.contexts),
                "negative": examples(self.seen, -position, self.tokenizer, self.settings.contexts),
            },
            **({} if writers is None else {"upstream": writers.into(covector, self.tokenizer)}),
        }

    def _tokens(self, covector: Tensor) -> dict[str, Any]:
        if self.vocabulary is None:
            return {"embedding": None, "unembedding": None}
        count = self.settings.words
        return {
            "embedding": self.vocabulary.inputs(covector, count),
            "unembedding": self.vocabulary.predictions(covector, count),
        }

    def own_directions(self) -> dict[str, Any]:
        """The block's own output directions, of its linear and its quadratic part, by share of the squared norm."""
        root, _ = self.seen.roots() if self.settings.coordinates == "data" else (None, None)
        jacobian = self.expansion.jacobian()
        left, values, _ = torch.linalg.svd(jacobian if root is None else jacobian @ root, full_matrices=False)
        squares, vectors = torch.linalg.eigh(self.expansion.output_gram(root))
        squares, vectors = squares.clamp_min(0).flip(-1), vectors.flip(-1)
        return {
            "own": {
                "linear": self._listed("linear", left, values.square(), root),
                "quadratic": self._listed("quadratic", vectors, squares, root),
            }
        }

    def _listed(self, kind: str, vectors: Tensor, squares: Tensor, root: Tensor | None) -> list[dict[str, Any]]:
        rows = []
        for number in range(min(self.settings.pairs, len(squares))):
            w = vectors[:, number]
            found = spectrum(self.expansion.quadratic(w, root), 1)
            values = (self.expansion.polynomial(self.seen.x) - self.expansion.constant) @ w
            rows.append(
                {
                    "name": f"{kind}:{number}",
                    "share": float(squares[number] / squares.sum().clamp_min(1e-300)),
                    "value": float(found.values[0]),
                    "value_share": float(found.shares[0]),
                    "effective_rank": found.effective_rank,
                    "promotes": None if self.vocabulary is None else self.vocabulary.promoted(w, self.settings.words),
                    "contexts": examples(self.seen, values.abs(), self.tokenizer, 2),
                }
            )
        return rows
