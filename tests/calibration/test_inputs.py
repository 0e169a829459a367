"""Calibration sources: what was asked for, or a clear error."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from evals.text import read
from surgery.calibration.held_out import fitted_sequences
from surgery.calibration.inputs import calibration_inputs
from surgery.calibration.samples import sample
from surgery.calibration.texts import check_source, documents, frame, tokens_of
from surgery.calibration.windows import SHORT
from surgery.errors import CalibrationError, RecipeError
from tests import tiny


class Characters:
    """A tokenizer that maps characters to ids 3 … 95."""

    eos_token_id, bos_token_id = 2, 1
    all_special_ids = (1, 2)

    def get_vocab(self):
        return {str(number): number for number in range(120)}  # more than the model has embeddings for

    def decode(self, ids, **_):
        return "x" * len(ids)

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(c) % 93 for c in text]}


MODEL = SimpleNamespace(config=tiny.make("llama").config)


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


def test_the_english_that_ships_with_python_is_plenty_and_stable():
    texts = list(documents("python"))
    assert sum(map(len, texts)) > 1_000_000
    assert texts == list(documents("python"))
    assert any("docstring" in text for text in texts)


def test_fingerprint_tells_inputs_apart():
    one = calibration_inputs(torch.arange(64), MODEL, None, tokens=64, length=16, batch=2)
    two = calibration_inputs(torch.arange(1, 65), MODEL, None, tokens=64, length=16, batch=2)
    same = calibration_inputs(torch.arange(64), MODEL, None, tokens=64, length=16, batch=2)
    assert one.fingerprint == same.fingerprint != two.fingerprint


def test_samples_are_the_models_own_and_follow_the_seed():
    model = tiny.make("llama")
    torch.manual_seed(1)
    one = sample(model, Characters(), 4, 10)
    torch.manual_seed(1)
    assert torch.equal(one, sample(model, Characters(), 4, 10))
    assert one.shape == (4, 10)
    assert (one[:, 0] == 1).all(), "from the start token"
    with pytest.raises(CalibrationError, match="cannot generate"):
        sample(tiny.make("bert"), Characters(), 4, 10)


@pytest.mark.parametrize("source", ["text", "samples"])
def test_windows_are_long_and_short_and_begin_both_ways(source, tmp_path):
    (tmp_path / "a.txt").write_text("hello world, how are you? " * 200)
    name = str(tmp_path / "a.txt") if source == "text" else "samples"
    model = tiny.make("llama")
    settings = {"tokens": 2048, "length": 96, "batch": 4, "short": 0.5, "unseen": 192}
    data = calibration_inputs(name, model, Characters(), **settings)
    long, short = ([b["input_ids"] for b in data.batches if b["input_ids"].shape[1] == n] for n in (96, SHORT))
    assert sum(len(batch) for batch in long) == 2048 // 2 // 96 + (source == "samples")
    assert all(len(batch) == 4 * 96 // SHORT for batch in short[:-1])
    assert abs(sum(batch.numel() for batch in short) - 1024) <= 128
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
    ids = tokens_of(str(tmp_path / "a.txt"), Characters(), 4000)
    assert torch.equal(torch.cat([b["input_ids"] for b in data.unseen]).flatten(), ids[2048 : 2048 + 480])


def test_a_start_token_that_the_tokenizer_gives_is_not_given_twice(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 400)
    data = calibration_inputs(str(tmp_path / "a.txt"), MODEL, WithStart(), tokens=2048, length=96, batch=4, short=0.5)
    ids = [batch["input_ids"] for batch in data.batches]
    assert all((part[:, 0] == 1).all() and (part[:, 1] != 1).all() for part in ids)


def test_model_inputs_come_from_a_safetensors_file(tmp_path):
    save_file({"pixel_values": torch.zeros(6, 3, 16, 16)}, tmp_path / "x.safetensors")
    data = calibration_inputs(str(tmp_path / "x.safetensors"), tiny.make("vit"), None, tokens=1, length=1, batch=4)
    assert [len(batch["pixel_values"]) for batch in data.batches] == [4, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such"),
        ("short.txt", "abc", "fewer than two"),
        ("empty.txt", "", "fewer than two"),
        ("bad.jsonl", '{"txt": "a"}', r"bad\.jsonl:1"),
        ("worse.jsonl", "not json", "cannot be read"),
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


class WithStart(Characters):
    """A tokenizer that begins every text with a start token, as Llama's and Gemma's do, and ends it."""

    def __call__(self, text, add_special_tokens=True, **_):
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_every_window_gets_the_frame_the_tokenizer_gives_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 40)
    assert frame(WithStart()) == ([1], [2])
    assert frame(Characters()) == ([], [])
    data = calibration_inputs(str(tmp_path / "a.txt"), MODEL, WithStart(), tokens=320, length=16, batch=8)
    ids = torch.cat([batch["input_ids"] for batch in data.batches])
    assert (ids[:, 0] == 1).all()
    assert (ids[:, -1] == 2).all()
    assert ids.shape == (320 // 14, 16)
    assert torch.equal(ids[:, 1:-1].flatten(), tokens_of(str(tmp_path / "a.txt"), Characters(), 320)[: 22 * 14])


def test_evaluation_predicts_every_token_of_the_text_once_behind_a_start_token(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 40)
    for stride in (None, 5):
        text = read(str(tmp_path / "a.txt"), WithStart(), tokens=301, length=16, stride=stride)
        assert (text.windows[:, 0] == 1).all()
        predicted = text.windows[:, 1:][text.fresh]
        assert torch.equal(predicted, tokens_of(str(tmp_path / "a.txt"), Characters(), 301)[: len(predicted)])
        assert len(predicted) > 280


@pytest.mark.parametrize(("characters", "long", "short", "unseen"), [(192, 2, 0, 0), (300, 2, 0, 1), (700, 4, 2, 1)])
def test_short_texts_are_shared_out(characters, long, short, unseen, tmp_path):
    """Less text than was asked for: first two long windows, then unseen ones (a quarter), then short ones."""
    (tmp_path / "a.txt").write_text("x" * (characters - 1))
    data = calibration_inputs(
        str(tmp_path / "a.txt"), MODEL, Characters(), tokens=65536, length=96, batch=4, short=0.2, unseen=8192
    )
    sizes = {n: sum(len(b["input_ids"]) for b in data.batches if b["input_ids"].shape[1] == n) for n in (96, SHORT)}
    assert sizes == {96: long, SHORT: short}
    assert sum(len(batch["input_ids"]) for batch in data.unseen) == unseen


def test_samples_never_leave_the_models_positions():
    model = tiny.make("gpt2")
    data = calibration_inputs("samples", model, Characters(), tokens=1024, length=128, batch=4, short=0.5)
    assert data.length == model.config.n_positions == 128


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
