"""The closed form, factored, against a dense least squares that knows nothing of the block's structure; then alone.

The dense route fits every output on all monomials of the input up to degree 2: 1 + d + d(d + 1)/2 features, as many
rows as SAMPLES_PER_FEATURE times that, normal equations. It stands for the route by full coefficient tensors of
EleutherAI/polyapprox (which is not on PyPI and is not timed here): what both pay for is a number per output and pair of
inputs. Both are scored on the same fresh inputs.

    python benchmarks/coefficients.py [--largest 64] [--alone 1024 4096 8192]
"""

import argparse
import json
import resource
import sys
import time

import torch

from surgery.closed_form.activations import ACTIVATIONS
from surgery.closed_form.forms import standardised
from surgery.closed_form.least_squares import solve_units
from surgery.closed_form.moments import InputMoments, Preactivations, from_gaussian

SAMPLES_PER_FEATURE, FRESH = 8, 4096
PEAK = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss in GiB


def gelu_block(d: int, h: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(h, d, generator=generator) / d**0.5
    last = torch.randn(d, h, generator=generator) / h**0.5
    return first, last


def true_output(x, first, last):
    return ACTIVATIONS["gelu"].function(x @ first.T) @ last.T


def factored(d: int, first):
    """Each unit's quadratic under N(0, I): what a conversion with `assume: standard` computes."""
    inputs = InputMoments.gaussian(torch.zeros(d), torch.eye(d))
    at = Preactivations.of(inputs, (first, None))
    units = solve_units(from_gaussian(ACTIVATIONS["gelu"], at, at, 2))
    return standardised(first, None, at.y_mean, at.y_std), units


def monomials(x):
    d = x.shape[1]
    rows, columns = torch.triu_indices(d, d)
    return torch.cat([torch.ones_like(x[:, :1]), x, x[:, rows] * x[:, columns]], dim=1)


def dense(d: int, first, last, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    count = 1 + d + d * (d + 1) // 2
    gram, cross = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, d, dtype=torch.float64)
    for _ in range(0, SAMPLES_PER_FEATURE * count, FRESH):
        x = torch.randn(FRESH, d, generator=generator)
        features = monomials(x.double())
        gram += features.T @ features
        cross += features.T @ true_output(x, first, last).double()
    return torch.linalg.solve(gram, cross)


def timed(function, *arguments):
    begun = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - begun


def score(predicted, truth) -> float:
    return float((predicted - truth).square().sum() / (truth - truth.mean(0)).square().sum())


def side_by_side(d: int) -> dict:
    first, last = gelu_block(d, 4 * d)
    (gate, units), quick = min((timed(factored, d, first) for _ in range(3)), key=lambda pair: pair[1])
    solution, slow = timed(dense, d, first, last)
    fresh = torch.randn(FRESH, d, generator=torch.Generator().manual_seed(2)).double()
    truth = true_output(fresh, first.double(), last.double())
    u = fresh @ gate.weight.double().T + gate.bias.double()
    return {
        "d": d, "h": 4 * d, "factored_seconds": quick, "dense_seconds": slow, "ratio": slow / quick,
        "factored_numbers": units.a.numel(), "dense_numbers": solution.numel(),
        "factored_fvu": score(units(u) @ last.double().T, truth),
        "dense_fvu": score(monomials(fresh) @ solution, truth),
    }  # fmt: skip


def alone(d: int) -> dict:
    h = 7 * d // 2  # 28672 at 8192, as in Llama 3 70B
    first, _ = gelu_block(d, h)
    _, seconds = timed(factored, d, first)
    return {"d": d, "h": h, "seconds": seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / PEAK}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=64, help="largest width for the dense route")
    parser.add_argument("--alone", type=int, nargs="*", default=[1024, 2048, 4096], help="widths for the factored one")
    options = parser.parse_args()
    found: dict = {"side_by_side": [], "alone": []}
    print(f"{'d':>6}{'h':>7}{'factored':>11}{'dense':>10}{'ratio':>9}{'numbers':>18}{'FVU on fresh inputs':>24}")
    for d in (32, 48, 64, 96, 128):
        if d <= options.largest:
            row = side_by_side(d)
            found["side_by_side"].append(row)
            print(
                f"{d:>6}{row['h']:>7}{row['factored_seconds'] * 1e3:>8.1f} ms{row['dense_seconds']:>8.2f} s"
                f"{row['ratio']:>9.0f}{row['factored_numbers']:>8,} :{row['dense_numbers']:>8,}"
                f"{row['factored_fvu']:>12.5f} :{row['dense_fvu']:>10.5f}"
            )
    for d in options.alone:
        row = alone(d)
        found["alone"].append(row)
        print(f"{d:>6}{row['h']:>7}{row['seconds']:>9.2f} s   peak of the process {row['peak_gib']:.1f} GiB")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
