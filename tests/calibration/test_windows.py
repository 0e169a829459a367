"""Windows, long and short."""

import pytest
import torch

from surgery.calibration.held_out import fitted_sequences
from surgery.calibration.inputs import calibration_inputs
from surgery.calibration.texts import special_tokens, tokens_of
from surgery.calibration.windows import SENTENCE, SHORT
from tests import tiny
from tests.calibration.support import MODEL, Characters, WithStart


@pytest.mark.parametrize("source", ["text", "samples"])
def test_windows_are_long_and_short_and_begin_both_ways(source, tmp_path):
    (tmp_path / "a.txt").write_text("hello world, how are you? " * 200)
    name = str(tmp_path / "a.txt") if source == "text" else "samples"
    model = tiny.make("llama")
    settings = {"tokens": 2048, "length": 96, "batch": 4, "short": 0.5, "unseen": 192}
    data = calibration_inputs(name, model, Characters(), **settings)
    few = SENTENCE if source == "text" else SHORT
    long, short = ([b["input_ids"] for b in data.batches if b["input_ids"].shape[1] == n] for n in (96, few))
    assert sum(len(batch) for batch in long) == 2048 // 2 // 96 + (source == "samples")
    assert all(len(batch) == 4 * 96 // few for batch in short[:-1])
    assert abs(sum(batch.numel() for batch in short) - 1024) <= 128
    if source == "text":
        assert all(row.tolist() == short[0][0].tolist() for batch in short for row in batch), "each begins a sentence"
    starts = torch.cat(long)[:, 0] == 1
    assert starts[::2].all()
    assert not starts[1::2].any()
    assert (torch.cat(short)[:, 0] == 1).all()
    unseen = torch.cat([batch["input_ids"] for batch in data.unseen])
    assert unseen.shape == (2, 96)
    again = calibration_inputs(name, model, Characters(), **settings)
    assert again.fingerprint == data.fingerprint != calibration_inputs(
        name, model, Characters(), **settings, seed=1
    ).fingerprint or (source == "text")


def test_unseen_tokens_are_after_those_used(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(33 + i * i % 90) for i in range(4000)))
    data = calibration_inputs(
        str(tmp_path / "a.txt"), MODEL, Characters(), tokens=2048, length=96, batch=4, short=0.5, unseen=480
    )
    ids, (part,) = tokens_of(str(tmp_path / "a.txt"), Characters(), 4000), data.parts
    end = part["end"]
    assert end == 3000, "a quarter of a text is left to whoever measures"
    assert torch.equal(torch.cat([b["input_ids"] for b in data.unseen]).flatten(), ids[end : end + 480])
    used = {tuple(row) for batch in data.batches for row in batch["input_ids"][:, 1:16].tolist()}
    places = [n for n, row in enumerate(ids[:end].unfold(0, 15, 1).tolist()) if tuple(row) in used]
    assert used <= {tuple(ids[n : n + 15].tolist()) for n in places}
    assert max(places) > 0.8 * end > 2048, "from all over the text"


def test_every_window_gets_the_frame_the_tokenizer_gives_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 40)
    assert special_tokens(WithStart()) == ([1], [2])
    assert special_tokens(Characters()) == ([], [])
    data = calibration_inputs(str(tmp_path / "a.txt"), MODEL, WithStart(), tokens=480, length=16, batch=8)
    ids = torch.cat([batch["input_ids"] for batch in data.batches])
    assert (ids[:, 0] == 1).all()
    assert (ids[:, -1] == 2).all()
    assert ids.shape == (480 // 14, 16)
    assert torch.equal(ids[:, 1:-1].flatten(), tokens_of(str(tmp_path / "a.txt"), Characters(), 480)[: 34 * 14])


def test_a_text_without_sentences_is_cut_anywhere(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 200)
    data = calibration_inputs(str(tmp_path / "a.txt"), MODEL, Characters(), tokens=1024, length=96, batch=4, short=0.5)
    short = torch.cat([batch["input_ids"] for batch in data.batches if batch["input_ids"].shape[1] == SENTENCE])
    assert abs(short.numel() - 512) <= 96
    assert (short[:, 0] == 1).all()


@pytest.mark.parametrize(("characters", "long", "short", "unseen"), [(192, 2, 0, 0), (300, 2, 0, 1), (700, 4, 8, 1)])
def test_short_texts_are_shared_out(characters, long, short, unseen, tmp_path):
    """Less text than was asked for: first two long windows, then unseen ones (a quarter), then short ones."""
    (tmp_path / "a.txt").write_text("x" * (characters - 1))
    data = calibration_inputs(
        str(tmp_path / "a.txt"), MODEL, Characters(), tokens=65536, length=96, batch=4, short=0.2, unseen=8192
    )
    sizes = {n: sum(len(b["input_ids"]) for b in data.batches if b["input_ids"].shape[1] == n) for n in (96, SENTENCE)}
    assert sizes == {96: long, SENTENCE: short}
    assert sum(len(batch["input_ids"]) for batch in data.unseen) == unseen


def test_random_tokens_stand_in_for_words_where_blocks_are_fitted(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 400)
    settings = {"tokens": 4096, "length": 96, "batch": 4, "short": 0.2, "unseen": 192}
    plain, data = (
        calibration_inputs(str(tmp_path / "a.txt"), MODEL, Characters(), **settings, random_tokens=share)
        for share in (0.0, 0.25)
    )
    of_text = torch.cat([batch["input_ids"].flatten() for batch in plain.batches]).unique()
    changed = []
    for fitted, *pair in zip(fitted_sequences(plain.batches), plain.batches, data.batches, strict=True):
        before, after = (batch["input_ids"] for batch in pair)
        assert torch.equal(before[fitted:], after[fitted:])
        special = before <= 2
        assert torch.equal(before[special], after[special])
        changed.append((before != after)[:fitted][~special[:fitted]])
    assert 0.22 < torch.cat(changed).float().mean() < 0.27
    met = torch.cat([batch["input_ids"].flatten() for batch in data.batches]).unique()
    assert len(met) > 2 * len(of_text)
    assert met.max() < 96 and 0 in met
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(plain.unseen, data.unseen, strict=True))
