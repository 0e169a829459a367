"""A norm read off from what it does, and steps that move its output."""

import pytest
import torch
import transformers as T
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from surgery.closed_form.normalisation import Normalisation

WIDTH = 24


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm(kind, seed=0):
    made = {
        "layer": lambda: nn.LayerNorm(WIDTH),
        "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
        "gemma": lambda: T.models.gemma.modeling_gemma.GemmaRMSNorm(WIDTH),  # scales by 1 + w
    }[kind]()
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.add_(drawn(seed + number, WIDTH))
    return made


@pytest.mark.parametrize("kind", ["layer", "rms", "gemma"])
def test_a_norm_is_read_off_from_its_values(kind):
    module, v = norm(kind), 30 * drawn(5, 7, WIDTH)
    found = Normalisation.of(module, v)
    assert found is not None and found.centred == (kind == "layer")
    with torch.no_grad():
        torch.testing.assert_close(found(v), module(v), rtol=1e-4, atol=1e-4)


def test_what_is_no_norm_is_none():
    v = drawn(0, 3, WIDTH)
    assert Normalisation.of(nn.Linear(WIDTH, WIDTH), v) is None
    assert Normalisation.of(lambda x: norm("rms")(x).tanh(), v) is None


@given(st.integers(0, 1000), st.sampled_from(["layer", "rms"]))
def test_a_small_step_moves_the_norm_where_it_can_be_moved(seed, kind):
    """A change of N that some change of v makes is found again, to first order; and the length of v stays."""
    found = Normalisation.of(norm(kind, seed), drawn(0, 1, WIDTH)).__class__(
        scale=0.5 + drawn(seed, WIDTH).abs(), shift=drawn(seed + 1, WIDTH), centred=kind == "layer"
    )
    v, change = (part.double() for part in (3 * drawn(seed + 2, 5, WIDTH), 1e-4 * drawn(seed + 3, 5, WIDTH)))
    wanted = found(v + change) - found(v)
    moved = found(v + found.moving(v, wanted)) - found(v)
    assert float((moved - wanted).norm() / wanted.norm()) < 0.05  # ε keeps the least scales back
    step = found.moving(v, drawn(seed + 4, 5, WIDTH).double())
    torch.testing.assert_close((step * v).sum(-1), step.new_zeros(5), rtol=0, atol=1e-6 * float(v.norm() * step.norm()))
    unmoved = found(v + wanted) - found(v)  # the negative control: a step taken as if there were no norm
    assert float((unmoved - wanted).norm() / wanted.norm()) > 0.1


def test_what_hardly_passes_the_norm_is_left_alone():
    scale = torch.ones(WIDTH)
    scale[3] = 0.0
    found = Normalisation(scale, torch.zeros(WIDTH), centred=False)
    v = drawn(0, 2, WIDTH)
    step = found.moving(v, torch.ones_like(v))
    assert bool(torch.isfinite(step).all())
    assert float(step[:, 3].abs().max()) < float(step.abs().max())
