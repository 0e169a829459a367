"""The tokens that units are solved on."""

import pytest
import torch

from surgery.fitting.block import FitSettings
from surgery.fitting.sample import take_sample
from surgery.fitting.target import Target
from tests.fitting.test_reconstruction import TOKENS, station_of


@pytest.mark.parametrize(("degree", "wanted"), [(1, 8192), (2, 8192), (3, TOKENS)])
def test_high_powers_are_solved_on_more_tokens(degree, wanted):
    station = station_of()
    original = station.block.weights(station.modules)
    with torch.no_grad():
        sample = take_sample(Target.of(station), original, degree, FitSettings(degree).unit_tokens, 5.0)
        assert len(sample.x) == pytest.approx(wanted, abs=1)
        (rows,) = sample.rows
        torch.testing.assert_close(sample.x, station.twin[0].x[rows])
        torch.testing.assert_close(sample.output, original(sample.x), rtol=1e-5, atol=1e-6)
