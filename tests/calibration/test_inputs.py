"""Calibration sources: what was asked for, or a clear error."""

import torch
from safetensors.torch import save_file

from evals.text import read
from surgery.calibration.inputs import calibration_inputs
from surgery.calibration.texts import tokens_of
from tests import tiny
from tests.calibration.support import MODEL, Characters, WithStart


def test_fingerprint_tells_inputs_apart():
    one = calibration_inputs(torch.arange(64), MODEL, None, tokens=64, length=16, batch=2)
    two = calibration_inputs(torch.arange(1, 65), MODEL, None, tokens=64, length=16, batch=2)
    same = calibration_inputs(torch.arange(64), MODEL, None, tokens=64, length=16, batch=2)
    assert one.fingerprint == same.fingerprint != two.fingerprint


def test_a_start_token_that_the_tokenizer_gives_is_not_given_twice(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 400)
    data = calibration_inputs(str(tmp_path / "a.txt"), MODEL, WithStart(), tokens=2048, length=96, batch=4, short=0.5)
    ids = [batch["input_ids"] for batch in data.batches]
    assert all((part[:, 0] == 1).all() and (part[:, 1] != 1).all() for part in ids)


def test_model_inputs_come_from_a_safetensors_file(tmp_path):
    save_file({"pixel_values": torch.zeros(6, 3, 16, 16)}, tmp_path / "x.safetensors")
    data = calibration_inputs(str(tmp_path / "x.safetensors"), tiny.make("vit"), None, tokens=1, length=1, batch=4)
    assert [len(batch["pixel_values"]) for batch in data.batches] == [4, 2]


def test_evaluation_predicts_every_token_of_the_text_once_behind_a_start_token(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 40)
    for stride in (None, 5):
        text = read(str(tmp_path / "a.txt"), WithStart(), tokens=301, length=16, stride=stride)
        assert (text.windows[:, 0] == 1).all()
        predicted = text.windows[:, 1:][text.fresh]
        assert torch.equal(predicted, tokens_of(str(tmp_path / "a.txt"), Characters(), 301)[: len(predicted)])
        assert len(predicted) > 280
