"""The exact re-expressions of a fitted block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.closed_form.activations import ACTIVATIONS
from surgery.closed_form.forms import OFFSET_LIMIT, Affine, balanced, bilinear, guarded, standardised
from surgery.closed_form.least_squares import solve_units
from surgery.closed_form.moments import InputMoments, Preactivations, from_data
from tests.closed_form.test_least_squares import draw


def gated_units(seed, planted=0.0):
    """Quadratic gated units; some are nearly free of the product term, which is where the bilinear form breaks."""
    x, gate, up = draw(seed)
    at = Preactivations.of(InputMoments.of(x), gate, up)
    y, z = torch.nn.functional.linear(x, *gate), torch.nn.functional.linear(x, *up)
    moments = from_data(ACTIVATIONS["silu"], at, y, z, 2)
    if planted:
        moments.t[:3], moments.tvu[:3] = moments.vu[:3, :3].clone(), moments.vvu[:3, :2].clone()  # v itself,
        moments.tvu[:3, 1] += planted * moments.vvu[:3, 2]  # and next to nothing of u v
        moments.tt[:3] = moments.vvu[:3, 0]
    return x, moments, standardised(*gate, at.y_mean, at.y_std), standardised(*up, at.z_mean, at.z_std)


def apply(affine, x):
    return affine.to(x.dtype)(x)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_bilinear_equals_factored(seed):
    x, moments, gate, up = gated_units(seed)
    units = guarded(moments, solve_units(moments))
    form = bilinear(units.a, units.b, gate, up)
    want = units(apply(gate, x), apply(up, x))
    got = apply(form.gate, x) * apply(form.up, x) + form.remainder
    assert (got - want).norm() < 1e-9 * want.norm()
    assert form.largest_offset <= OFFSET_LIMIT * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_balanced_units_compute_the_same_and_have_one_norm_each(seed):
    draw_one = torch.Generator().manual_seed(seed)
    scales = (10 * torch.randn(3, 7, generator=draw_one, dtype=torch.float64)).clamp(-20, 20).exp()

    def affine(rows, columns):
        weight = torch.randn(rows, columns, generator=draw_one, dtype=torch.float64)
        return Affine(weight, torch.randn(rows, generator=draw_one, dtype=torch.float64))

    gate, up, down = affine(7, 5), affine(7, 5), affine(4, 7)
    gate = Affine(scales[0, :, None] * gate.weight, scales[0] * gate.bias)
    up = Affine(scales[1, :, None] * up.weight, scales[1] * up.bias)
    down = Affine(down.weight / (scales[0] * scales[1]), down.bias)
    up.weight[3] = 0  # a unit that is not there stays as it is
    x = torch.randn(20, 5, generator=draw_one, dtype=torch.float64)
    want = down(gate(x) * up(x))
    made = balanced(gate, up, down)
    got = made[2](made[0](x) * made[1](x))
    assert (got - want).norm() <= 1e-12 * want.norm()
    norms = torch.stack([made[0].weight.norm(dim=1), made[1].weight.norm(dim=1), made[2].weight.norm(dim=0)])
    for unit in (0, 1, 2, 4, 5, 6):
        assert torch.allclose(norms[:, unit], norms[0, unit].expand(3), rtol=1e-9)
    assert torch.equal(made[0].weight[3], gate.weight[3]) and torch.equal(made[2].weight[:, 3], down.weight[:, 3])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_ill_conditioned_units_survive_low_precision(dtype, tolerance):
    """bfloat16 keeps 8 bits: an offset of 16 standard deviations costs 16 · 2⁻⁸ = 6 % at worst."""
    x, moments, gate, up = gated_units(5, planted=1e-7)
    raw = solve_units(moments)
    safe = guarded(moments, raw)

    def rounding_error(units):
        form = bilinear(units.a, units.b, gate, up)
        low = x.to(dtype)
        value = (apply(form.gate, low) * apply(form.up, low)).double() + form.remainder
        want = units(apply(gate, x), apply(up, x))
        return ((value - want).norm(dim=0) / want.norm(dim=0)).max()

    assert bilinear(raw.a, raw.b, gate, up).largest_offset > 1e4, "the plant must be ill-conditioned"
    assert rounding_error(safe) < tolerance
    assert rounding_error(raw) > 10 * tolerance
    # A unit that is v alone has no bilinear form with a bounded offset; the guard's answer is next to it.
    assert (safe.r2[:3] > 0.98).all()


def test_guarded_leaves_good_units_alone():
    _, moments, _, _ = gated_units(0)
    units = solve_units(moments)
    assert guarded(moments, units, limit=1e9) is units
    strict = guarded(moments, units, limit=0.05)
    changed = (strict.a != units.a).any(-1)
    assert changed.any()
    assert (strict.r2 <= units.r2 + 1e-12).all(), "a constrained fit cannot be better"
