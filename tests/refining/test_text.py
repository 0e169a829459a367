"""What is trained on, and what is held out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import CalibrationError
from surgery.models import loading
from surgery.refining.run import refined
from surgery.refining.settings import RefineSettings
from surgery.refining.text import OFFLINE, training_sources, training_windows
from tests import tiny
from tests.refining.support import settings_of


def test_a_short_text_is_gone_through_again_in_another_order(place, tmp_path):
    record = refined(settings_of(place, tmp_path / "out", tokens=40_000))
    assert record["tokens_seen"] == 40_000 // 256 * 256
    assert record["passes_over_the_text"] > 3


def test_what_was_held_out_once_stays_so(place, tmp_path):
    """Refined again on the same text, with other settings for what is held out."""
    refined(settings_of(place, tmp_path / "one"))
    again = settings_of(place, tmp_path / "two", validate_tokens=1024)
    again = RefineSettings(**{**vars(again), "twin": str(tmp_path / "one")})
    record = refined(again)
    assert record["held_out"]["text.txt"]["end"] == 512
    report = json.loads((tmp_path / "two" / "surgery.json").read_text())
    assert len(report["earlier_refinements"]) == 1


def test_text_the_conversion_saw_is_not_held_out(place, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text((place / "text.txt").read_text()[:9000])
    surgery.convert(place / "llama", output=tmp_path / "twin", text=str(short), tokens=1024, window=32, measure=0)
    settings = {**vars(settings_of(place, tmp_path / "out")), "twin": str(tmp_path / "twin"), "text": (str(short),)}
    record = refined(RefineSettings(**settings))
    (part,) = json.loads((tmp_path / "twin" / "surgery.json").read_text())["calibration"]["parts"]
    assert record["held_out"]["short.txt"]["begin"] == part["end"] > part["tokens"] == 1024
    with pytest.raises(CalibrationError, match="unseen"):
        refined(RefineSettings(**{**settings, "validate_tokens": 8192}), overwrite=True)


def test_every_text_gives_its_share_and_a_short_one_comes_again(place, tmp_path):
    (tmp_path / "long.txt").write_text((place / "text.txt").read_text() * 4)
    (tmp_path / "short.txt").write_text("XYZ " * 700)
    settings = settings_of(place, tmp_path / "out")
    texts = (f"{tmp_path}/long.txt=3", f"{tmp_path}/short.txt")
    settings = RefineSettings(**{**vars(settings), "text": texts, "tokens": 8192, "validate_tokens": 1024})
    tokenizer = loading.loaded(settings.twin).tokenizer
    report = json.loads((Path(settings.twin) / "surgery.json").read_text())
    teacher = loading.loaded(settings.original).model
    held, found, ranges = training_windows(settings, tokenizer, report, teacher, tmp_path)
    windows = found.texts
    of_short = torch.isin(windows.ids, torch.tensor(tokenizer("XYZ", add_special_tokens=False)["input_ids"]))
    share = (of_short.float().mean(1) > 0.5).float().mean()
    assert share == pytest.approx(0.25, abs=0.02)
    assert len(windows) == pytest.approx(8192 // settings.window, abs=2)
    sizes = {name: len(part) * settings.window for name, part in held.items()}
    assert sizes == {"long.txt": 768, "short.txt": 256}
    assert ranges["short.txt"]["read"] < 8192 // 4 + 256, "it is gone through more than once"


def test_a_share_of_the_windows_is_sentences(place, tmp_path):
    """Where positions keep them apart; a document alone fills its windows."""
    (tmp_path / "story.txt").write_text("The quick brown fox jumps over the dog. It is lazy! " * 400)
    settings = settings_of(place, tmp_path / "out", text=(f"{tmp_path}/story.txt",), tokens=2048)
    loaded = loading.loaded(settings.twin)
    report = json.loads((Path(settings.twin) / "surgery.json").read_text())
    teacher = loading.loaded(settings.original).model

    def windows(teacher, **more):
        given = replace(settings, **more), loaded.tokenizer, report, teacher, tmp_path
        return training_windows(*given)[1].texts

    found = windows(teacher, short=0.25)
    beginnings = (found.positions == 0).sum(1)
    assert len(found) == len(windows(teacher, short=0.0)) == 2048 // settings.window
    assert (beginnings > 1).float().mean() == pytest.approx(0.25, abs=0.02)
    assert ((windows(teacher, short=0.0).positions == 0).sum(1) == 1).all(), "the control"
    leaking = windows(tiny.make("opt"), short=0.25)
    assert leaking.ids.equal(windows(tiny.make("opt"), short=0.0).ids), "it has no way to keep them apart"


def test_without_a_network_what_there_is_is_trained_on_and_said(place, tmp_path):
    settings = settings_of(place, tmp_path / "out")
    settings = RefineSettings(**{**vars(settings), "text": ("auto",), "tokens": 100_000})
    tokenizer = loading.loaded(settings.twin).tokenizer
    sources, note = training_sources(settings, tokenizer)
    assert sources == OFFLINE
    assert "cannot be fetched" in note
    named = RefineSettings(**{**vars(settings), "text": ("python",)})
    assert training_sources(named, tokenizer) == (("python",), "")
    with pytest.raises(CalibrationError, match="of broad cannot be fetched"):
        training_sources(RefineSettings(**{**vars(settings), "text": ("broad",)}), tokenizer)
