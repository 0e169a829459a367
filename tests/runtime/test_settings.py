"""Settings by name: what is not one, what lacks, and what is too little."""

from dataclasses import dataclass

import pytest

from surgery.cli import main
from surgery.conversion.recipe import load_recipe
from surgery.errors import RecipeError
from surgery.refining.settings import RefineSettings
from surgery.runtime.settings import at_least, checked_settings, whole_number


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


@pytest.mark.parametrize(
    ("given", "number"),
    [
        *(("51200", 51200), (51200, 51200), ("200k", 200_000), ("16K", 16_000), ("4M", 4_000_000), ("1.5k", 1500)),
        *((" 2b ", 2_000_000_000), ("1e3", 1000), ("-3", -3), ("", None), ("k", None), ("1.5", None), ("nan", None)),
        *(("inf", None), ("1e999", None), ("many", None), (True, None), (None, None)),
    ],
)
def test_whole_numbers_are_written_in_one_way_everywhere(given, number):
    assert whole_number(given) == number


def test_counts_are_read_alike_by_recipes_settings_and_options(tmp_path):
    (tmp_path / "recipe.yaml").write_text("tokens: 16k\nwindow: 1k\n")
    recipe = load_recipe(str(tmp_path / "recipe.yaml"), {"measure": "2k"})
    assert (recipe.tokens, recipe.window, recipe.measure) == (16_000, 1000, 2000)
    given = {"twin": "a", "original": "b", "output": "c", "tokens": "4M"}
    assert checked_settings(RefineSettings, given).tokens == 4_000_000
    for command in main.cli.commands.values():
        for option in command.params:
            if option.type.name in ("integer", "integer range"):
                assert option.name in ("nproc",), f"{command.name} {option.name}"  # no counts
    with pytest.raises(RecipeError, match="tokens"):
        load_recipe(None, {"tokens": "16 thousand"})
