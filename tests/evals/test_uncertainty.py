"""Intervals."""

import pytest
import torch

from evals.uncertainty import bootstrap_ratio, paired_difference


def test_bootstrap_covers_and_pairing_helps():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(60):
        sample = torch.randn(40, generator=generator)
        found = bootstrap_ratio(sample + 0.5, torch.ones(40), resamples=1000)
        hits += found.low < 0.5 < found.high
    assert 50 <= hits <= 60
    base = torch.randn(200, generator=generator)
    mean, error = paired_difference(base.tolist(), (base + 0.1).tolist())
    assert mean == pytest.approx(0.1, abs=1e-6)
    assert error < 1e-6
