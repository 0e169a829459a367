"""The model's own texts."""

import pytest
import torch

from surgery.calibration.inputs import calibration_inputs
from surgery.calibration.samples import sample
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


def test_samples_never_leave_the_models_positions():
    model = tiny.make("gpt2")
    data = calibration_inputs("samples", model, Characters(), tokens=1024, length=128, batch=4, short=0.5)
    assert data.length == model.config.n_positions == 128
