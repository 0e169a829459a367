"""Minimal pairs of English subject–verb agreement across an intervening noun, made from word lists; no network."""

from __future__ import annotations

from itertools import product
from typing import Any

SUBJECTS = (
    ("key", "keys"), ("picture", "pictures"), ("teacher", "teachers"), ("letter", "letters"),
    ("window", "windows"), ("answer", "answers"), ("driver", "drivers"), ("tree", "trees"),
)  # fmt: skip
PLACES = ("near the cabinets", "behind the door", "beside the roads", "from the village", "of my friends")
PREDICATES = (("is", "are", "old"), ("was", "were", "late"), ("has", "have", "changed"))


def pairs() -> list[dict[str, str]]:
    """240 pairs {sentence_good, sentence_bad} that differ in the verb's number only."""
    rows = []
    for (one, many), place, (singular, plural, rest) in product(SUBJECTS, PLACES, PREDICATES):
        for noun, right, wrong in ((one, singular, plural), (many, plural, singular)):
            rows.append(
                {
                    "sentence_good": f"The {noun} {place} {right} {rest}.",
                    "sentence_bad": f"The {noun} {place} {wrong} {rest}.",
                }
            )
    return rows


def dataset(**_: Any) -> dict[str, Any]:
    """What lm-eval reads."""
    import datasets

    return {"test": datasets.Dataset.from_list(pairs())}
