"""How well a polynomial of given degree can stand for a block, in closed form, the last map kept.

R² = 1 − FVU, FVU = Σ‖f(x) − p(x)‖² ÷ Σ‖f(x) − f̄‖², for

    gaussian, on N(μ, Σ)   the best of all polynomials of this degree in x, on fresh samples of the Gaussian it is for
    gaussian, on text      the same polynomial on held-out real inputs
    data, on text          the best in each unit's own preactivations under the data's moments, on held-out real inputs

Used through training, where the question is how the two kinds of figures part (Belrose & Rigg, arXiv 2502.01032).
"""

from __future__ import annotations

from torch import Tensor

from surgery.blocks.weights import BlockWeights
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine
from surgery.closed_form.least_squares import solve_units
from surgery.closed_form.moments import InputMoments, Preactivations, UnitMoments, from_data, from_gaussian
from surgery.fitting.features import HiddenPolynomial

SAMPLES = 2048  # of the Gaussian


def polynomial(original: BlockWeights, at: Preactivations, moments: UnitMoments) -> BlockPolynomial:
    """The optimal polynomial of a block for whatever `moments` describe, its last map kept."""
    units = solve_units(moments)
    weight, bias = original.down
    down = Affine(weight.double(), weight.new_zeros(len(weight)).double() if bias is None else bias.double())
    hidden = HiddenPolynomial.of(original, at, units)
    return BlockPolynomial(hidden.gate, hidden.up, units.a, units.b, down)


def under_gaussian(original: BlockWeights, inputs: InputMoments, degree: int) -> BlockPolynomial:
    """Optimal under N(μ, Σ) with the moments of `inputs`."""
    at = Preactivations.of(inputs, original.gate, original.up)
    return polynomial(original, at, from_gaussian(original.activation, at, at, degree))


def under_mixture(
    original: BlockWeights, whole: InputMoments, parts: list[tuple[float, InputMoments]], degree: int
) -> BlockPolynomial:
    """Per unit optimal under a mixture of Gaussians: (weight, moments) of each component; `whole` sets the scale."""
    at = Preactivations.of(whole, original.gate, original.up)
    sums = [
        from_gaussian(original.activation, at, Preactivations.of(part, original.gate, original.up), degree, weight)
        for weight, part in parts
    ]
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return polynomial(original, at, total)


def under_data(original: BlockWeights, inputs: InputMoments, x: Tensor, degree: int) -> BlockPolynomial:
    """Per unit optimal under the rows of `x`, (tokens, d)."""
    at = Preactivations.of(inputs, original.gate, original.up)
    return polynomial(original, at, from_data(original.activation, at, *original.preactivations(x), degree))


def r_squared(original: BlockWeights, found: BlockPolynomial, x: Tensor) -> float:
    """On the rows of `x`."""
    truth, guess = original(x).double(), found(x.double())
    return float(1 - (truth - guess).square().sum() / (truth - truth.mean(0)).square().sum().clamp_min(1e-300))


def approximations(
    original: BlockWeights, fit: Tensor, score: Tensor, degrees: tuple[int, ...]
) -> dict[str, dict[str, float]]:
    """R² by degree and setting, from rows to fit on and held-out rows, (tokens, d) each."""
    inputs = InputMoments.of(fit)
    drawn = inputs.sample(SAMPLES).to(fit)
    found: dict[str, dict[str, float]] = {}
    for degree in degrees:
        gaussian = under_gaussian(original, inputs, degree)
        found[str(degree)] = {
            "gaussian_on_gaussian": r_squared(original, gaussian, drawn),
            "gaussian_on_text": r_squared(original, gaussian, score),
            "data_on_text": r_squared(original, under_data(original, inputs, fit, degree), score),
        }
    return found
