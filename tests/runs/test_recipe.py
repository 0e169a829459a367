"""The recipe of a whole run: strict, every problem with its line."""

from pathlib import Path

import pytest

from surgery.errors import RecipeError
from surgery.runs.recipe import load_run
from surgery.runs.run import plan_run
from tests import tiny

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    tiny.save_with_tokenizer("llama", folder)
    return folder


def written(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_followed_as_far_as_no_model_is_needed(path, llama, tmp_path):
    """Against a tiny Llama, since the models that recipes name are on the Hub."""
    planned = plan_run(path, sets=[f"model={llama}", "convert.window=32", "eval.window=32"], output=tmp_path / "out")
    assert planned["stages"][0]["stage"] == "convert"
    assert all(row["why"] == "not done yet" for row in planned["stages"])
    assert all(row["seconds"] is None or row["seconds"] > 0 for row in planned["stages"])
    assert planned["bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_there_are_the_recipes_that_the_readme_names():
    assert {path.stem for path in RECIPES} == {"demo", "quadratic", "cubic", "refined", "gaussian", "budget"}


def test_every_problem_is_said_at_once_with_its_line(tmp_path):
    file = written(
        tmp_path,
        "model: x\nconvert:\n  degre: 2\n  tokens: many\nrefine:\n  rate: fast\neval:\n  kinds: {a: b}\n"
        "push: {repository: a/b/c}\ntokens: 5\nevl: {}\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_run(file)
    text = str(caught.value)
    for line, said in (
        (3, "convert.degre: unknown key (did you mean 'degree'?)"),
        (4, "convert.tokens: 'many' is not a whole number"),
        (8, "eval.kinds: unknown key (did you mean 'kind'?)"),
        (10, "tokens: unknown key (it belongs below `convert:`)"),
        (11, "evl: unknown key (did you mean 'eval'?)"),
    ):
        assert f"{file}:{line}: {said}" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("convert: {degree: 2}\n", "no model was named"),
        ("model: 5\n", "model: 5 will not do"),
        ("model: x\nconvert: {model: y}\n", "belongs at the top of the recipe"),
        ("model: x\nconvert: {degree: [2, 2]}\n", "each only once"),
        ("model: x\nconvert: {degree: [2, 12]}\n", r"recipe.yaml:2: convert.degree: 12 will not do"),
        ("model: x\nrefine: {rate: fast}\n", r"recipe.yaml:2: refine: rate is 'fast', which will not do"),
        ("model: x\nrefine: {train: blok}\n", "did you mean 'block'"),
        ("model: x\neval: {text: pyton}\n", "did you mean 'python'"),
        ("model: x\neval: {kind: {novel: nowhere.txt}}\n", "nowhere.txt"),
        ("model: x\npush: {private: true}\n", "repository is missing"),
        ("model: x\nrefine: 3\n", "it should be a mapping"),
        ("model: x\ndevice: banana\n", "no device 'banana'"),
        ("model: x\ndegree: 2\n", "`surgery convert --recipe"),
        ("model: x\nmodel: y\n", r"recipe.yaml:2: model is given twice"),
        ("model: x\nconvert: {tokens: 1k\n", "not valid YAML"),
    ],
)
def test_what_cannot_be_followed(text, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        load_run(written(tmp_path, text))


def test_the_first_degree_is_the_twin(tmp_path):
    file = written(tmp_path, "model: x\noutput: out\nconvert: {degree: [2, 1, 3], tokens: 8k}\nrefine: {rate: 2e-4}\n")
    recipe = load_run(file)
    assert [plan.degree for plan in recipe.conversions] == [2, 1, 3]
    assert [plan.output for plan in recipe.conversions] == ["out/degree-2", "out/degree-1", "out/degree-3"]
    assert recipe.conversions[0].tokens == 8000
    assert recipe.final == Path("out/refined")
    assert recipe.refinement().rate == 2e-4, "a number without a point is a number"
    assert recipe.eval is recipe.card is recipe.push is None


def test_a_recipe_is_changed_from_the_command_line(tmp_path):
    file = written(tmp_path, "model: x\nconvert: {degree: 2}\nrefine: {}\n")
    recipe = load_run(file, ["convert.degree=3", "refine=false", "eval.tokens=4k", "model=y"], "elsewhere")
    assert (recipe.conversions[0].degree, recipe.refine, recipe.model) == (3, None, "y")
    assert recipe.eval == {"tokens": "4k"}
    assert recipe.output == Path("elsewhere")
    for change in ("degree", "=3", "convert.degree=[2"):
        with pytest.raises(RecipeError, match="--set"):
            load_run(file, [change])


def test_names_of_earlier_versions_are_understood(tmp_path):
    file = written(tmp_path, "model: x\nconvert: {calibration: python, length: 64}\n")
    with pytest.warns(FutureWarning, match="calibration is called text now"):
        recipe = load_run(file)
    assert (recipe.conversions[0].text, recipe.conversions[0].window) == ("python", 64)
