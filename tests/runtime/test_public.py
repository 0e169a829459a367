"""What leaves the machine names no place on it."""

import json
import os

import pytest

from evals.report import write_evaluation
from surgery.runtime.public import public, public_text


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "secret" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def test_paths_are_named_by_their_last_part_wherever_they_stand(here):
    for path in (f"{here}/secret/model", "secret/model", "~/secret/model", "./secret/model/", "../x/../secret/model"):
        assert public_text(path).strip("/") == "model" or not os.path.exists(path)
    said = f'no "{here}/secret/model/vocab.json" in ({here}/secret/model), nor in ~/secret/model; see'
    assert public_text(said) == 'no "vocab.json" in (model), nor in model; see'
    nested = {f"{here}/a": [(f"at {here}/secret/b",), {"x": {"y": f"&#34;{here}/secret/c&#34;"}}], "n": 3, "none": None}
    assert public(nested) == {"a": [("at b",), {"x": {"y": "&#34;c&#34;"}}], "n": 3, "none": None}
    assert here not in json.dumps(public(nested))


@pytest.mark.parametrize(
    "text",
    [
        *("them/base", "hub:them/texts@0123/file.json.gz", "https://hf.co/them/base", "see http://localhost:80/tmp/x"),
        *("model.layers.0.mlp", "and/or", "R²/held", "/somebody/elses/path", "input / output", "3/4", "", "a\nb"),
        *("novels.txt", "D:\\x\\y", "/", "//", "~"),
    ],
)
def test_what_is_no_place_here_stays(text, here):
    assert public_text(text) == text


def test_evaluations_are_cleaned(here, tmp_path, monkeypatch):
    report = {
        "models": {"twin": {"name": "t"}, "original": {"name": "o"}},
        "settings": {"twin": f"{here}/secret/model", "task_settings": {"include_path": [f"{here}/secret/model"]}},
        "versions": {}, "seconds": {}, "blocks": [], "text": None,
    }  # fmt: skip
    monkeypatch.setattr("evals.report.markdown", json.dumps)
    monkeypatch.setattr("evals.report.page", json.dumps)
    write_evaluation(report, tmp_path / "evaluation")
    for file in (tmp_path / "evaluation").iterdir():
        assert here not in file.read_text() and "model" in file.read_text()
