"""Recipes are strict: every problem at once, each with its line and the nearest name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.conversion.recipe import load_recipe, parse_blocks
from surgery.errors import RecipeError


def test_every_problem_is_reported_at_once_with_its_line(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("model: x\n\ndegre: 2\nassume: datas\ntokens: many\nwindow: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file), {})
    text = str(caught.value)
    assert "4 problems in the recipe" in text
    assert f"{file}:3: degre: unknown key (did you mean 'degree'?)" in text
    for line, key in ((4, "assume"), (5, "tokens"), (6, "window")):
        assert f"{file}:{line}: {key}: " in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "mapping"),
        ("model: [unclosed\n", "not valid YAML"),
        ("degree: 2\ndegree: 3\n", "given twice"),
        ("form: native\ndegree: 3\n", "bilinear"),
        ("moments: a.safetensors\n", "assume: gaussian"),
        ("blocks: 1-x\n", "neither a number"),
        ("degree: '2'\n", "degree"),
    ],
)
def test_impossible_recipes(text, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(file), {})


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("degree: 3\nlength: 64\n")
    recipe = load_recipe(str(file), {"degree": 1, "tokens": None})
    assert (recipe.degree, recipe.window, recipe.tokens) == (1, 64, 65536)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(str(tmp_path / "none.yaml"), {})


@given(st.sets(st.integers(0, 40), min_size=1))
def test_block_lists_mean_what_they_say(wanted):
    assert parse_blocks(",".join(map(str, wanted))) == sorted(wanted)
    low, high = min(wanted), max(wanted)
    assert parse_blocks(f"{low}-{high}") == list(range(low, high + 1))


def test_defaults_that_depend_on_other_settings_are_spelled_out():
    def resolved(**settings):
        return load_recipe(None, settings).resolved()

    assert resolved(degree=3)["tail_weight"] == 0
    assert resolved(degree=5)["tail_weight"] == 0.01
    assert resolved(degree=5, tail_weight=0.0)["tail_weight"] == 0
    assert resolved(degree=5, assume="gaussian")["tail_weight"] == 0
    epochs = [resolved(tokens=tokens)["epochs"] for tokens in (4096, 65536, 131072, 262144, 1_000_000)]
    assert epochs == [6, 6, 3, 2, 1], "more tokens are seen less often"
    assert (resolved(tokens=131072, epochs=6)["epochs"], resolved(degree=3)["epochs"]) == (6, 0)
    assert resolved()["short"] is None, "it depends on what can be fetched"
    assert resolved(text="samples")["short"] == 0.5
    assert resolved(text="python")["short"] == 0.1
    assert resolved(text=["python=2", "code"])["short"] == 0.1
    assert resolved(text={"python": 1.0, "samples": 2.0})["short"] is None
    assert resolved(text="python", short=0.0)["short"] == 0


@pytest.mark.parametrize("given", [5, [1, 2], {"a.txt": "b"}])
def test_calibration_that_is_no_source_is_told_once(given):
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, {"text": given})
    assert str(caught.value).count("neither a source") == 1


def test_a_wrong_option_is_told_with_its_value_the_nearest_known_one_and_the_next_step():
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, {"assume": "gausian", "degree": 12})
    text = str(caught.value)
    assert "2 problems in the settings" in text
    assert "assume: 'gausian' will not do (did you mean 'gaussian'?)" in text
    assert "degree: 12 will not do" in text
    assert "next step" in text
