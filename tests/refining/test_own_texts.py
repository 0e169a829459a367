"""The original's own texts."""

from types import SimpleNamespace

import torch

from surgery.models import loading
from surgery.refining import own_texts
from tests.refining.support import settings_of

ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def test_a_draw_that_was_killed_goes_on_to_the_same_texts(place, tmp_path, monkeypatch):
    settings = settings_of(place, tmp_path / "out", window=8)
    original = loading.loaded(settings.original)
    monkeypatch.setattr(own_texts, "DRAWN_TOGETHER", 4)

    def texts(folder):
        return [
            list(text) for text in own_texts.own_texts(settings, original.model, original.tokenizer, 80, ALONE, folder)
        ]

    whole = texts(tmp_path / "whole")
    assert len(whole) == 10
    assert all(len(text) == 8 for text in whole)
    assert len({tuple(text) for text in whole}) > 5, "every draw is another"
    (file,) = (tmp_path / "whole").iterdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[: 4 * 8 * 6 + 5])  # killed within the second draw
    drawn, real = [], own_texts.sample

    def counting(*given, **more):
        drawn.append(given[2])
        return real(*given, **more)

    monkeypatch.setattr(own_texts, "sample", counting)
    torch.manual_seed(99)
    assert texts(tmp_path / "cut") == whole
    assert drawn == [4, 2], "the first draw was kept"
    assert texts(tmp_path / "cut") == whole
    assert drawn == [4, 2], "nothing is drawn twice"
