"""Settings by name: what is not one, what lacks, and what is too little."""

from dataclasses import dataclass

import pytest

from surgery.errors import RecipeError
from surgery.runtime.settings import at_least, checked_settings


@dataclass(frozen=True)
class Some:
    name: str
    tokens: int = at_least(2, 16)
    stride: int | None = at_least(1, None)


def test_defaults_and_values_are_taken():
    assert checked_settings(Some, {"name": "a"}) == Some("a", 16, None)
    assert checked_settings(Some, {"name": "a", "tokens": 2, "stride": None}) == Some("a", 2, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "name is not given"),
        ({"name": "a", "token": 3}, "did you mean 'tokens'"),
        ({"name": "a", "tokens": 1}, "tokens is 1, but must be at least 2"),
        ({"name": "a", "tokens": float("nan")}, "must be a whole number"),
        ({"name": "a", "tokens": "many"}, "must be a whole number"),
        ({"name": "a", "tokens": None}, "must be a whole number"),
        ({"name": "a", "stride": 0}, "stride is 0"),
        ({"name": "a", "tokens": True}, "must be a whole number"),
    ],
)
def test_what_is_wrong_is_said(given, said):
    with pytest.raises(RecipeError, match=said):
        checked_settings(Some, given)


def test_everything_wrong_is_said_at_once():
    with pytest.raises(RecipeError, match=r"no setting 'x'.*; name is not given; .*stride is -1"):
        checked_settings(Some, {"x": 1, "stride": -1})
