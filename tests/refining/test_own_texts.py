"""The original's own texts, drawn as the training goes."""

from dataclasses import replace

import pytest
import torch

from surgery.errors import CalibrationError
from surgery.models import loading
from surgery.refining import own_texts
from surgery.refining.own_texts import OwnTexts
from surgery.refining.packing import PackedWindows, pack
from surgery.refining.run import refined
from surgery.refining.sequence import FRESH, TrainingWindows
from tests.refining.support import interrupted, settings_of


@pytest.fixture
def draws(monkeypatch):
    """How many texts each draw had; four at once."""
    drawn, real = [], own_texts.sample

    def counting(*given, **more):
        drawn.append(given[2])
        return real(*given, **more)

    monkeypatch.setattr(own_texts, "sample", counting)
    monkeypatch.setattr(own_texts, "DRAWN_TOGETHER", 4)
    return drawn


@pytest.fixture
def own(place, tmp_path):
    """Makes the texts of a run."""
    settings = settings_of(place, tmp_path / "out", window=8, short=0.0)
    original = loading.loaded(settings.original)

    def made(count):
        def windows(texts):
            return (pack(texts, 8, original.tokenizer, with_positions=True),)

        return OwnTexts(settings, original.model, original.tokenizer, count, windows, quiet=True)

    return made


def test_texts_are_drawn_as_they_are_taken_and_none_twice(own, draws):
    texts = own(10)
    assert draws == []
    first = texts.take(3)
    assert draws == [4]
    rest = texts.take(7)
    assert draws == [4, 4, 2], "no more than are needed"
    rows = torch.cat([first.ids, rest.ids])
    assert rows.shape == (10, 8)
    assert len(rows.unique(dim=0)) == 10
    state = torch.get_rng_state()
    assert torch.equal(texts.again().take(10).ids, rows)
    assert torch.equal(torch.get_rng_state(), state), "training's own randomness goes on as it was"


def test_what_is_held_out_is_kept_and_is_none_that_is_trained_on(own, draws):
    texts = own(8)
    held = [list(text) for text in texts.held_out(41)]
    assert [len(text) for text in held] == [8] * 6
    again = own(8)
    assert [list(text) for text in again.held_out(48)] == held
    trained = texts.take(8).ids.tolist()
    assert not [row for row in trained if row in held]
    assert again.take(8).ids.tolist() == trained


def test_the_state_goes_on_with_the_same_texts(own, draws):
    texts = own(12)
    texts.take(2)
    state = texts.state()
    expected = texts.take(10).ids
    del draws[:]
    other = own(12)
    other.load_state(state)
    assert torch.equal(other.take(10).ids, expected)
    assert draws == [4, 4], "what was drawn and not taken is part of the state"
    assert texts.seconds > 0


def test_texts_that_fill_no_window_are_an_error(own):
    texts = own(4)
    texts.pack = lambda _: (PackedWindows(torch.zeros(0, 8, dtype=torch.int32), None),)
    with pytest.raises(CalibrationError, match="fills no window of 8"):
        texts.again().take(1)


def test_own_windows_take_their_places_among_those_of_texts(own):
    ids = torch.arange(48, dtype=torch.int32).view(6, 8)
    windows = TrainingWindows(PackedWindows(ids, ids % 8), own(3), seed=0)
    assert (len(windows), windows.length) == (9, 8)
    steps = [windows.of_step(step, 3) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        numbers = torch.cat([step.numbers for step in epoch])
        assert sorted(numbers.tolist()) == [FRESH] * 3 + list(range(6)), "every window of a text once a pass"
    fresh = torch.cat([step.ids[step.numbers == FRESH] for step in steps])
    assert len(fresh.unique(dim=0)) == 6, "in every pass others"
    assert all(torch.equal(step.ids[step.numbers >= 0], ids[step.numbers[step.numbers >= 0]]) for step in steps)
    again = windows.again()
    assert torch.equal(again.of_step(0, 3).ids, steps[0].ids)


@pytest.mark.parametrize("texts", [("samples",), ("text.txt", "samples")])
def test_a_killed_refinement_on_its_own_texts_goes_on_exactly(place, tmp_path, draws, texts):
    given = tuple(str(place / name) if "." in name else name for name in texts)
    settings = settings_of(place, tmp_path / "whole", text=given, tokens=2048, validate_tokens=256)
    whole = refined(settings)
    assert whole["drawing_seconds"] > 0
    assert whole["held_out"]["samples"]["end"] == 256 // len(texts)
    assert sum(draws) == pytest.approx((2048 + 256) // 32 // len(texts), abs=8)
    with interrupted(after=2):
        refined(replace(settings, output=str(tmp_path / "cut")))
    before = sum(draws)
    again = refined(replace(settings, output=str(tmp_path / "cut")))
    assert again["losses"] == whole["losses"]
    assert sum(draws) - before < (before - len(texts)) / 2, "what was drawn before is not drawn again"
