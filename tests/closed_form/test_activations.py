"""Expectations of activations under a Gaussian, against brute-force integration."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.closed_form.activations import ACTIVATIONS, Activation, hermite_values, quadrature, recognise

DEGREE = 6


def brute_force(function, m, s, kink=None):
    """Gauss–Legendre on many small panels, split at the kink: an integrator of another kind than the code's."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(-12, 12, 481)
    if kink is not None and abs((kink - m) / s) < 12:
        edges = np.sort(np.append(edges, (kink - m) / s))
    half = np.diff(edges) / 2
    u = torch.from_numpy(((edges[1:] + edges[:-1]) / 2)[:, None] + half[:, None] * nodes).flatten()
    w = torch.from_numpy(half[:, None] * weights).flatten() * torch.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    return (function(m + s * u) * w) @ hermite_values(u, DEGREE)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(ACTIVATIONS)),
    m=st.floats(-4, 4),
    s=st.floats(0.05, 6),
)
def test_expectations_agree_with_brute_force(name, m, s):
    row = ACTIVATIONS[name]
    got, error = row.hermite_expectations(
        torch.tensor([m], dtype=torch.float64), torch.tensor([s], dtype=torch.float64), DEGREE
    )
    want = brute_force(row.function, m, s, kink=0.0)
    scale = want.abs().max().clamp_min(1e-6)
    assert error < 1e-10
    torch.testing.assert_close(got[0] / scale, want / scale, rtol=0, atol=1e-11)


def test_quadrature_reports_what_a_kink_costs_it():
    """ReLU by quadrature is visibly worse than by formula, and the error estimate says so."""
    m, s = torch.tensor([0.3]).double(), torch.tensor([2.0]).double()
    exact, zero = ACTIVATIONS["relu"].hermite_expectations(m, s, 3)
    rough, error = quadrature(torch.relu, m, s, 3)
    assert zero == 0
    difference = float((exact - rough).abs().max() / exact.abs().max())
    assert 1e-10 < difference <= 10 * error


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_rows_are_recognised_by_value(name):
    assert recognise(ACTIVATIONS[name].function, "?").name == name


ROWS = {  # by transformers' name: ours
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "linear": "linear",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh", "mish": "mish",
    "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu2", "sigmoid": "sigmoid", "silu": "silu",
    "swish": "silu", "tanh": "tanh",
}  # fmt: skip


def transformers_activations():
    from transformers.activations import ACT2FN

    return sorted(ACT2FN)


@pytest.mark.parametrize("key", transformers_activations())
def test_every_activation_of_transformers_is_recognised_or_keeps_its_name(key):
    from transformers.activations import ACT2FN

    function = ACT2FN[key].double() if isinstance(ACT2FN[key], torch.nn.Module) else ACT2FN[key]
    found = recognise(function, key)
    assert found.name == ROWS.get(key, key)
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(found.function(x), function(x), rtol=1e-5, atol=1e-6)


def test_unknown_elementwise_function_is_kept_and_softmax_is_refused():
    odd = recognise(torch.sin, "sine")
    assert isinstance(odd, Activation)
    assert odd.name == "sine"
    assert recognise(lambda x: torch.softmax(x, -1), "softmax") is None
