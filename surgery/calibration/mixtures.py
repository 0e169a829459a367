"""Several sources of text, each with its share of the tokens.

novels.txt=2 speeches.txt samples      half novels, a quarter speeches, a quarter the model's own samples
broad                                  many kinds of openly licensed text, see :mod:`surgery.calibration.common_pile`
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.calibration.common_pile import PARTS as BROAD_PARTS
from surgery.calibration.texts import BROAD, SAMPLES, check_source, label
from surgery.errors import RecipeError

Given = str | Iterable[str] | Mapping[str, float]
"""A source, several as `SOURCE` or `SOURCE=SHARE`, or shares by source."""

SHORT_OF_SAMPLES, SHORT_OF_TEXTS = 0.5, 0.1  # samples stand for whatever comes, texts are measured in long windows
INPUTS = ".safetensors"


@dataclass(frozen=True)
class Part:
    """One source, and its share of all tokens, of 1."""

    source: str
    share: float

    def short(self, given: float | None) -> float:
        """Share of its tokens in short windows: `given`, or the default of its kind."""
        return given if given is not None else SHORT_OF_SAMPLES if self.source == SAMPLES else SHORT_OF_TEXTS


@dataclass(frozen=True)
class Mixture:
    """What is read: parts whose shares add up to 1.

    Attributes:
        name: what reports call it.
    """

    name: str
    parts: tuple[Part, ...]

    @staticmethod
    def of(given: Given) -> Mixture:
        """From a source, several, or shares by source.

        Raises:
            RecipeError: no source, one given twice, or a share that is not above 0.
        """
        if isinstance(given, str):
            given = [given]
        shares = dict(given) if isinstance(given, Mapping) else _shares(given)
        if not shares:
            raise RecipeError("no text was named", fix="give a source, as samples, broad or a file")
        for source, share in shares.items():
            if not 0 < share < float("inf"):
                raise RecipeError(f"a share of {share:g} is not above 0", where=source)
        parts = []
        for source, share in shares.items():
            inside = BROAD_PARTS if source == BROAD else {source: 1.0}
            parts += [Part(name, share * own / sum(inside.values())) for name, own in inside.items()]
        total = sum(part.share for part in parts)
        named = [label(source) for source in shares]
        if len(set(named)) < len(named):
            raise RecipeError(
                "two sources of one name", where=", ".join(shares), cause="reports tell them apart by name"
            )
        return Mixture(" + ".join(named), tuple(Part(part.source, part.share / total) for part in parts))

    def without(self, missing: Container[Part]) -> Mixture:
        """The other parts, the proportions between them as they are."""
        left = [part for part in self.parts if part not in missing]
        total = sum(part.share for part in left)
        return Mixture(self.name, tuple(Part(part.source, part.share / total) for part in left))

    def share(self, source: str) -> float:
        """Of one source, 0 where it is none of the parts."""
        return sum(part.share for part in self.parts if part.source == source)

    @property
    def one(self) -> bool:
        return len(self.parts) == 1

    @property
    def is_inputs(self) -> bool:
        """Whether it is a file of model inputs instead of text."""
        return any(part.source.endswith(INPUTS) for part in self.parts)

    def check(self) -> None:
        """Raises RecipeError for a source that cannot be what was meant, before a model is loaded."""
        for part in self.parts:
            check_source(part.source)
        if self.is_inputs and not self.one:
            raise RecipeError("model inputs are no part of a mixture", where=self.name, fix="give texts, or them alone")


def _shares(given: Iterable[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in given:
        source, equals, number = text.rpartition("=")
        try:
            share = float(number) if equals else 1.0
        except ValueError:
            source, equals, share = text, "", 1.0  # a name that holds an equals sign
        source = source if equals else text
        if source in shares:
            raise RecipeError("a source is given twice", where=source, fix="give it once, with a share: SOURCE=2")
        shares[source] = share
    return shares


def seen_of(calibration: Mapping[str, Any], source: str) -> int:
    """How many tokens of `source`, from its beginning, a conversion may have seen, by its report's `calibration`."""
    parts = calibration.get("parts") or [{"source": calibration["source"], "end": calibration["tokens"]}]
    return max((int(part["end"] or 0) for part in parts if label(part["source"]) == label(source)), default=0)
