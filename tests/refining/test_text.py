"""What is trained on, and what is held out."""

import json

import pytest

import surgery
from surgery.refining.run import refined
from surgery.refining.settings import RefineSettings
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
    from surgery.errors import CalibrationError

    short = tmp_path / "short.txt"
    short.write_text((place / "text.txt").read_text()[:9000])
    surgery.convert(
        place / "llama", output=tmp_path / "twin", calibration=str(short), tokens=1024, length=32, measure=0
    )
    settings = {**vars(settings_of(place, tmp_path / "out")), "twin": str(tmp_path / "twin"), "text": (str(short),)}
    record = refined(RefineSettings(**settings))
    (part,) = json.loads((tmp_path / "twin" / "surgery.json").read_text())["calibration"]["parts"]
    assert record["held_out"]["short.txt"]["begin"] == part["end"] > part["tokens"] == 1024
    with pytest.raises(CalibrationError, match="unseen"):
        refined(RefineSettings(**{**settings, "validate_tokens": 8192}), overwrite=True)
