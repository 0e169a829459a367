"""Agreement with EleutherAI/polyapprox, an independent implementation of the paper, to its own precision."""

from pathlib import Path

import numpy as np
import pytest
import torch

from surgery.closed_form.activations import ACTIVATIONS
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine, standardised
from surgery.closed_form.least_squares import solve_units
from surgery.closed_form.moments import InputMoments, Preactivations, from_gaussian

FILE = np.load(Path(__file__).parents[1] / "data" / "polyapprox.npz")
CASES = sorted({key.split("/")[0] for key in FILE.files})
# Where the oracle integrates numerically it is good to 1e-8 only; `test_activations` holds ours to 1e-11 against a
# third integrator. Elsewhere both are formulas.
QUADRATURE = ("sigmoid", "swish")
NAMES = {"swish": "silu", "identity": "linear"}


def tensors(case):
    return {key.split("/")[1]: torch.from_numpy(FILE[key]) for key in FILE.files if key.startswith(case + "/")}


def factors(case, data, degree):
    """Units, first map(s) and readout of our answer."""
    activation = ACTIVATIONS[NAMES.get(case.split("_")[-1], case.split("_")[-1])]
    first = data["W1"] if "W1" in data else data["W"]
    d = first.shape[1]
    mean, covariance = data.get("mean", torch.zeros(d)), data.get("cov", torch.eye(d))
    gate = (first, data["b1"])
    up = (data["V"], data["b2"]) if case.startswith("glu") else None
    at = Preactivations.of(InputMoments.gaussian(mean, covariance), gate, up)
    units = solve_units(from_gaussian(activation, at, at, degree))
    folded = standardised(*gate, at.y_mean, at.y_std)
    second = None if up is None else standardised(*up, at.z_mean, at.z_std)
    out = len(first)
    readout = (
        Affine(data["W2"], data["b2"]) if up is None else Affine(torch.eye(out).double(), torch.zeros(out).double())
    )
    return units, folded, second, readout


def closed_form(case, data, degree):
    """(α, β, Γ) in x, dense."""
    units, gate, up, down = factors(case, data, degree)
    expansion = BlockPolynomial(gate, up, units.a, units.b, down).expand()
    gamma = torch.stack([expansion.quadratic(row).dense() for row in torch.eye(len(down.bias)).double()])
    return expansion.constant, expansion.jacobian(), gamma


@pytest.mark.parametrize("case", [case for case in CASES if "mixture" not in case])
def test_same_coefficients(case):
    data = tensors(case)
    alpha, beta, gamma = closed_form(case, data, 2 if "quadratic" in case else 1)
    atol = 2e-8 if case.endswith(QUADRATURE) else 1e-12
    torch.testing.assert_close(alpha, data["alpha"], rtol=0, atol=atol)
    torch.testing.assert_close(beta, data["beta"].T, rtol=0, atol=atol)
    if "gamma" in data:
        torch.testing.assert_close(gamma, data["gamma"], rtol=0, atol=atol)


def test_the_comparison_can_fail():
    """Negative control: another activation's coefficients are not these."""
    data = tensors("mlp_quadratic_gelu")
    alpha, _, _ = closed_form("mlp_quadratic_relu", data, 2)
    assert (alpha - data["alpha"]).abs().max() > 1e-3


def best_affine(case, data, weights):
    """The best affine map of x under a mixture, from what each unit's closed form says under each Gaussian of it.

    Cov(f, x) = Σ_k w_k (β_k Σ_k + E_k f μ_kᵀ) − E f μᵀ, with β_k and E_k f of the best affine map under component k.
    """
    found = []
    for mean, covariance in zip(data["mean"], data["cov"], strict=True):
        alpha, beta, _ = closed_form(case, {**data, "mean": mean, "cov": covariance}, 1)
        found.append((mean, covariance, alpha + beta @ mean, beta))
    whole = sum(w * mean for w, (mean, _, _, _) in zip(weights, found, strict=True))
    value = sum(w * f for w, (_, _, f, _) in zip(weights, found, strict=True))
    square = sum(w * (c + torch.outer(m, m)) for w, (m, c, _, _) in zip(weights, found, strict=True))
    cross = sum(w * (b @ c + torch.outer(f, m)) for w, (m, c, f, b) in zip(weights, found, strict=True))
    beta = torch.linalg.solve(square - torch.outer(whole, whole), (cross - torch.outer(value, whole)).T).T
    return value - beta @ whole, beta


MIXTURES = [case for case in CASES if "mixture" in case]


@pytest.mark.parametrize("case", MIXTURES)
def test_the_same_affine_map_under_a_mixture(case):
    data = tensors(case)
    alpha, beta = best_affine(case, data, [1 / 3] * 3)
    atol = 2e-8 if case.endswith(QUADRATURE) else 1e-11
    torch.testing.assert_close(alpha, data["alpha"], rtol=0, atol=atol)
    torch.testing.assert_close(beta, data["beta"].T, rtol=0, atol=atol)
    other, _ = best_affine(case, data, [0.5, 0.25, 0.25])
    assert (other - data["alpha"]).abs().max() > 1e-3 or case.endswith("identity"), "other weights, another map"
