"""Text sources."""

import json

import pytest
import torch

from surgery.calibration import text_files
from surgery.calibration.inputs import calibration_inputs
from surgery.calibration.texts import check_source, documents, ids_of, tokens_of
from surgery.errors import CalibrationError, RecipeError
from tests.calibration.support import MODEL, Characters


def test_text_and_json_lines_become_windows(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 40)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "hello world " * 20}) for _ in range(2)))
    for name in ("a.txt", "a.jsonl"):
        data = calibration_inputs(str(tmp_path / name), MODEL, Characters(), tokens=320, length=16, batch=8)
        assert data.tokens == 320
        assert data.batches[0]["input_ids"].shape == (8, 16)
        assert sum(len(batch["input_ids"]) for batch in data.batches) == 20


def test_documents_are_separated_and_tokens_can_be_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n\n{"text": "de"}\n')
    ids = tokens_of(str(tmp_path / "a.jsonl"), Characters(), 100)
    assert (ids == 2).nonzero().flatten().tolist() == [3, 6]
    assert torch.equal(tokens_of(str(tmp_path / "a.jsonl"), Characters(), 3, skip=2), ids[2:5])


def test_a_long_text_is_read_in_parts_and_no_more_of_it_than_wanted(monkeypatch):
    lines = "".join(f"line {number}\n" for number in range(300))
    (whole,) = ids_of([lines], Characters(), 10_000)
    monkeypatch.setattr(text_files, "TOGETHER", 100)
    parts = list(ids_of([lines, "ab"], Characters(), 10_000))
    assert len(parts) > 20
    assert [token for part in parts[:-1] for token in part] == list(whole)
    assert len(parts[-1]) == 3, "each text is closed once"

    def endless():
        while True:
            yield lines

    assert sum(map(len, ids_of(endless(), Characters(), 5000))) == 5000
    assert len(next(ids_of(endless(), Characters(), 10**9))) <= 100
    cut, *_ = ids_of(["x" * 250], Characters(), 10_000)
    assert len(cut) == 100, "without a line end it is cut anyway"


def test_the_english_that_ships_with_python_is_plenty_and_stable():
    texts = list(documents("python"))
    assert sum(map(len, texts)) > 1_000_000
    assert texts == list(documents("python"))
    assert any("docstring" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such"),
        ("short.txt", "abc", "fewer than two"),
        ("empty.txt", "", "fewer than two"),
        ("bad.jsonl", '{"txt": "a"}', r"bad\.jsonl:1"),
        ("worse.jsonl", "not json", "not JSON"),
        ("broken.safetensors", "xx", "not a readable"),
    ],
)
def test_bad_sources_are_clear_errors(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        calibration_inputs(str(tmp_path / name), MODEL, Characters(), tokens=320, length=16, batch=8)


def test_a_misspelt_source_is_caught_before_anything_is_loaded():
    with pytest.raises(RecipeError, match="did you mean 'samples'"):
        check_source("sample")
