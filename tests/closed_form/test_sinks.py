"""Sinks: found by norm, reproduced by one unit, and kept from leaking."""

import torch

from surgery.closed_form import sinks
from surgery.closed_form.moments import InputMoments


def test_sinks_are_found_by_norm_and_only_while_they_are_exceptions():
    sizes = torch.ones(1000)
    assert not (sizes > sinks.threshold(sizes)).any()
    sizes[:5] = 500.0
    assert int((sizes > sinks.threshold(sizes)).sum()) == 5
    sizes[:100] = 500.0
    assert not (sizes > sinks.threshold(sizes)).any(), "a tenth of the tokens is no exception"


def test_a_sink_is_told_by_the_models_largest():
    """Gemma's sinks are 27 times the median, SmolLM2's 170, beside tokens that are 12 times it for a few layers."""
    assert [sinks.limit_of(largest) for largest in (0.0, 27.0, 100.0, 170.0, 5000.0)] == [5.0, 5.0, 10.0, 17.0, 20.0]
    sizes = torch.ones(1000)
    sizes[:5], sizes[5:12] = 500.0, 12.0
    assert [int((sizes > sinks.threshold(sizes, times)).sum()) for times in (5.0, 17.0)] == [12, 5]


def test_a_unit_points_at_each_kind_of_sink_and_leaks_little():
    g = torch.Generator().manual_seed(0)
    d = 32
    ordinary = torch.randn(5000, d, generator=g) @ torch.diag(torch.linspace(0.5, 2, d)) + 1
    far = torch.zeros(6, d)
    far[:4, 0], far[4:, 1] = 60.0, -60.0
    units = sinks.directions(InputMoments.of(ordinary), far + 0.01 * torch.randn(6, d, generator=g))
    assert units.weight.shape == (2, d)

    def features(x):
        return (x.double() @ units.weight.T + units.bias).square()

    at = features(far)
    torch.testing.assert_close(at[:4, 0], torch.ones(4).double(), rtol=0, atol=0.01)
    torch.testing.assert_close(at[4:, 1], torch.ones(2).double(), rtol=0, atol=0.01)
    assert features(ordinary).square().mean().sqrt() < 1e-2
    assert len(sinks.directions(InputMoments.of(ordinary), far[:0]).bias) == 0


def test_only_a_block_that_writes_the_massive_activation_is_a_writer():
    assert sinks.written(torch.full((3,), 10.0), torch.full((3,), 1000.0))
    assert not sinks.written(torch.full((3,), 1000.0), torch.full((3,), 1.0))
    assert not sinks.written(torch.zeros(0), torch.zeros(0))
