"""Several sources with their shares."""

import pytest
import torch

from surgery.calibration.held_out import fitted_sequences
from surgery.calibration.inputs import calibration_inputs
from surgery.calibration.mixtures import Mixture, seen_of
from surgery.errors import CalibrationError, RecipeError
from tests.calibration.support import MODEL, Characters

SETTINGS = {"tokens": 4096, "length": 64, "batch": 4, "short": 0.0}


@pytest.fixture
def two(tmp_path):
    """Two texts that can be told apart by every token."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 20_000)
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def of_each(batches):
    ids = torch.cat([batch["input_ids"] for batch in batches])
    return [int((ids == 3 + ord(name) % 93).sum()) for name in "ab"]


def test_shares_are_given_in_three_ways():
    spelled = Mixture.of(["a.txt=3", "samples"])
    assert spelled == Mixture.of({"a.txt": 3.0, "samples": 1.0}) == Mixture.of({"a.txt": 0.75, "samples": 0.25})
    assert [part.share for part in spelled.parts] == [0.75, 0.25]
    assert [part.short(None) for part in spelled.parts] == [0.1, 0.5]
    assert Mixture.of("a=b.txt").parts[0].source == "a=b.txt", "a name that holds an equals sign"
    assert sum(part.share for part in Mixture.of("broad").parts) == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no text was named"),
        (["a.txt", "a.txt=2"], "given twice"),
        (["one/a.txt", "two/a.txt"], "two sources of one name"),
        (["a.txt=0"], "not above 0"),
        ({"a.txt": float("nan")}, "not above 0"),
    ],
)
def test_what_is_no_mixture_is_refused(given, words):
    with pytest.raises(RecipeError, match=words):
        Mixture.of(given)


def test_every_source_gives_its_share_of_what_is_fitted_held_out_and_measured(two):
    data = calibration_inputs([f"{two[0]}=3", two[1]], MODEL, Characters(), **SETTINGS, unseen=1024)
    assert of_each(data.batches) == [3072, 1024]
    assert of_each(data.unseen) == [768, 256]
    held = [
        {"input_ids": batch["input_ids"][fitted:]}
        for batch, fitted in zip(data.batches, fitted_sequences(data.batches), strict=True)
    ]
    assert of_each(held) == [384, 128], "the ridge is chosen on all kinds"
    assert data.source == "a.txt + b.txt"
    assert [(part["source"], part["tokens"]) for part in data.parts] == [("a.txt", 3072), ("b.txt", 1024)]


def test_a_report_tells_how_far_each_source_was_read(two):
    data = calibration_inputs([f"{two[0]}=3", two[1]], MODEL, Characters(), **SETTINGS)
    described = data.as_dict()
    assert [seen_of(described, source) for source in (*two, "c.txt")] == [15_000, 8192, 0]
    assert seen_of({"source": "old.txt", "tokens": 5}, "elsewhere/old.txt") == 5, "a report of an earlier version"


def test_a_share_of_less_than_one_sequence_is_an_error(two):
    with pytest.raises(CalibrationError, match="less than one sequence"):
        calibration_inputs([f"{two[0]}=100", two[1]], MODEL, Characters(), **SETTINGS)
