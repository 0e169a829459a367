"""The model's own texts."""

import pytest
import torch

from surgery.calibration.inputs import calibration_inputs
from surgery.calibration.openings import openings
from surgery.calibration.samples import knows_english, sample
from surgery.errors import CalibrationError
from tests import tiny
from tests.calibration.support import Characters


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


def test_every_other_sample_goes_on_from_an_opening_that_the_tokenizer_knows():
    model = tiny.make("llama")
    begun = openings(Characters())
    length = len(begun[0])
    assert all(len(row) == length for row in begun) and len({tuple(row) for row in begun}) > 40
    drawn = sample(model, Characters(), 9, length + 6)
    opened = [row[1 : 1 + length].tolist() in begun for row in drawn]
    assert sum(opened) == 4
    assert not any(opened[:2]) and all(opened[2:4]), "two of each in turn: both begin in every way windows begin"
    short = sample(model, Characters(), 8, length)
    assert not any(row[1:].tolist() in [known[: length - 1] for known in begun] for row in short), "no room to go on"

    class Residues(Characters):
        unk_token_id = 3 + ord(" ") % 93

    assert not knows_english(Residues()) and knows_english(Characters())
    drawn = sample(model, Residues(), 8, length + 6)
    assert not any(row[1 : 1 + length].tolist() in begun for row in drawn)


def test_samples_never_leave_the_models_positions():
    model = tiny.make("gpt2")
    data = calibration_inputs("samples", model, Characters(), tokens=1024, length=128, batch=4, short=0.5)
    assert data.length == model.config.n_positions == 128
