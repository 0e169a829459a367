"""Hidden vectors whose maps are multiplied in bfloat16."""

from dataclasses import replace

import pytest
import torch

from surgery.blocks.weights import BlockWeights
from surgery.closed_form.activations import ACTIVATIONS
from surgery.closed_form.forms import Affine
from surgery.closed_form.least_squares import UnitPolynomials
from surgery.fitting.features import CACHED, HiddenPolynomial, RoundedHidden

WIDTH, UNITS, SINKS = 24, 40, 2


def exact(gated: bool, offset: float) -> HiddenPolynomial:
    """Cubic units, standardised about inputs whose mean is `offset`, and two units of sinks."""
    torch.manual_seed(0)
    a, b = torch.randn(UNITS, 4).double(), torch.randn(UNITS, 3).double()
    gate, up = torch.randn(2, UNITS, WIDTH).double() / WIDTH**0.5
    maps = [Affine(weight, -offset * weight.sum(-1)) for weight in (gate, up)]
    units = UnitPolynomials(a, b if gated else None, torch.ones(UNITS).double(), 1.0)
    plain = HiddenPolynomial(maps[0], maps[1] if gated else None, units)
    pointing = torch.randn(SINKS, WIDTH).double()
    return plain.with_sink_units(Affine(pointing, -offset * pointing.sum(-1))).to(torch.float32)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, CACHED + 1])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_what_is_large_and_cancels_is_not_rounded(gated, tokens, offset):
    hidden = exact(gated, offset)
    x = offset + torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    found = RoundedHidden.of(hidden, torch.full((WIDTH,), offset).double(), SINKS)(x)
    truth = hidden(x)
    assert found.dtype == torch.float32
    assert found.shape == (tokens, UNITS + SINKS + 1)
    near = 1e-3 if offset else 1e-5  # float32's own, where means of 300 cancel
    torch.testing.assert_close(found[:, -1 - SINKS :], truth[:, -1 - SINKS :], rtol=near, atol=near)
    if tokens:
        off = (found - truth).norm() / truth.norm()
        assert 0 < off < 0.02
    if tokens > 1 and offset:
        careless = RoundedHidden.of(hidden, torch.zeros(WIDTH), SINKS)(x)
        assert (careless - truth).norm() > 0.1 * truth.norm(), "the control: about no centre"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 5])
def test_a_block_multiplied_in_bfloat16_answers_in_its_input_s_precision(dtype, tokens):
    torch.manual_seed(0)
    gate, up, down = torch.randn(8, 4).to(dtype), torch.randn(8, 4).to(dtype), torch.randn(4, 8).to(dtype)
    block = BlockWeights(ACTIVATIONS["silu"], (gate, None), (up, None), (down, None))
    rounded, x = replace(block, matmul="bfloat16"), torch.randn(tokens, 4).to(dtype)
    for one, two in zip((*block.preactivations(x), block(x)), (*rounded.preactivations(x), rounded(x)), strict=True):
        assert one.dtype == two.dtype == dtype
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05 * float(one.abs().max() if tokens else 1))
        assert torch.equal(one, two) == (dtype != torch.float32 or not tokens), "float32 alone is rounded"
