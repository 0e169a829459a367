"""The ridge for the readout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.closed_form.ridge import HeldRows, RidgeSums, factorise, most_useful, ridge_path, solved

seeds = st.integers(0, 2**16)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, width=st.integers(1, 23))
def test_half_a_gram_matrix_is_enough(seed, width):
    f = torch.randn(40, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(RidgeSums.of(f, f).full_gram(), f.T @ f)


def regression(seed, tokens=300, p=12, q=4, noise=0.5):
    g = torch.Generator().manual_seed(seed)
    f = torch.cat([torch.randn(tokens, p, generator=g), torch.ones(tokens, 1)], dim=-1).double()
    truth = torch.randn(p + 1, q, generator=g).double()
    return f, f @ truth + noise * torch.randn(tokens, q, generator=g).double(), truth


def test_ridge_recovers_a_linear_map_and_reports_r2():
    f, t, truth = regression(0, noise=0.0)
    found = ridge_path(RidgeSums.of(f[:200], t[:200]), RidgeSums.of(f[200:], t[200:]), torch.zeros_like(truth))
    assert (found.weight - truth).norm() < 1e-3 * truth.norm()
    held = RidgeSums.of(f[200:], t[200:])
    assert held.r2(found.weight) > 1 - 1e-4
    variance = (t[200:] - t[200:].mean(0)).square().sum()
    assert held.r2(torch.zeros_like(truth)) == pytest.approx(1 - float(t[200:].square().sum() / variance), rel=1e-9)


def test_ridge_keeps_a_good_prior_where_data_is_scarce():
    """A prior near the truth and few noisy rows: held-out choice must pull towards it, and beat plain least squares."""
    f, t, truth = regression(1, tokens=24, noise=3.0)
    prior = truth + 0.01
    found = ridge_path(RidgeSums.of(f[:16], t[:16]), RidgeSums.of(f[16:], t[16:]), prior)
    plain = torch.linalg.lstsq(f[:16], t[:16]).solution
    assert found.ridge >= 0.3
    assert (found.weight[:-1] - truth[:-1]).norm() < (plain[:-1] - truth[:-1]).norm()


def test_free_features_are_not_pulled():
    f, t, truth = regression(2, tokens=4000, noise=0.01)
    prior = torch.zeros_like(truth)
    fit, held = RidgeSums.of(f[:3000], t[:3000]), RidgeSums.of(f[3000:], t[3000:])
    found = ridge_path(fit, held, prior, ridges=(1000.0,), free=3)
    assert (found.weight[-3:] - truth[-3:]).norm() < 0.2 * truth[-3:].norm()
    assert found.weight[:-3].norm() < 0.01 * truth[:-3].norm()


def test_ridge_sums_stream_and_add():
    f, t, _ = regression(3)
    whole = RidgeSums.of(f, t)
    total = RidgeSums.of(f[:100], t[:100]) + RidgeSums.of(f[100:], t[100:])
    streamed = RidgeSums.zeros(f.shape[1], t.shape[1])
    for rows in (slice(0, 7), slice(7, 100), slice(100, None)):
        streamed.add_rows(f[rows], t[rows])
    for name in ("weight", "gram", "cross", "target_square"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name))
        torch.testing.assert_close(getattr(streamed, name), getattr(whole, name))


def test_the_ridge_is_the_best_of_the_path_on_held_out_tokens():
    """With more outputs than directions to compare on, too."""
    f, t, truth = regression(4, tokens=60, q=100, noise=2.0)
    fit, held = RidgeSums.of(f[:30], t[:30]), RidgeSums.of(f[30:], t[30:])
    zero = torch.zeros_like(truth)
    grid = (1e-3, 0.1, 0.3, 1.0, 10.0)
    scores = {ridge: held.r2(ridge_path(fit, held, zero, ridges=(ridge,)).weight) for ridge in grid}
    found = ridge_path(fit, held, zero, ridges=grid)
    assert max(scores.values()) - min(scores.values()) > 0.01
    assert scores[found.ridge] > max(scores.values()) - 0.002


@settings(max_examples=20, deadline=None)
@given(seed=seeds, kept=st.integers(1, 12))
def test_held_out_rows_choose_what_their_sums_choose(seed, kept):
    """Of some of the features, too; the two errors differ by a constant."""
    f, t, truth = regression(seed, tokens=60, q=100, noise=2.0)
    some = torch.tensor([*range(kept), 12])
    fit, zero = RidgeSums.of(f[:30], t[:30]).at(some), torch.zeros_like(truth[some])
    rows, sums = HeldRows(f[30:], t[30:]).at(some), RidgeSums.of(f[30:], t[30:]).at(some)
    one, other = (ridge_path(fit, held, zero) for held in (rows, sums))
    assert one.ridge == other.ridge and torch.equal(one.weight, other.weight)
    sketch = torch.eye(100, dtype=torch.float64)
    apart = [rows.error(weight, sketch) - sums.error(weight, sketch) for weight in (zero, truth[some])]
    assert apart[0] == pytest.approx(apart[1]) and apart[0] > 0


def test_a_ridge_too_weak_to_be_solved_with_is_passed_over():
    """Two copies of a feature, a gram matrix that rounding has made indefinite, and a path that leads down to it."""
    f, t, truth = regression(5, noise=0.0)
    twice = torch.cat([f[:, :1], f], dim=1)
    fit, held = RidgeSums.of(twice[:200], t[:200]), RidgeSums.of(twice[200:], t[200:])
    fit.gram[0, 0] -= 1e-3 * fit.gram[0, 0]
    zero = torch.zeros(len(truth) + 1, t.shape[1], dtype=torch.float64)
    found = ridge_path(fit, held, zero, ridges=(1e-9, 1e-2, 0.3))
    assert found.ridge == 1e-2
    assert held.r2(found.weight) > 0.99


@settings(max_examples=20, deadline=None)
@given(seed=seeds, size=st.integers(1, 40))
def test_a_matrix_is_factorised_in_its_own_place_and_solved_with(seed, size):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size + 1, generator=generator, dtype=torch.float64)
    matrix, right = root @ root.T + torch.eye(size), torch.randn(size, 3, generator=generator, dtype=torch.float64)
    factor = matrix.clone()
    place = factor.data_ptr()
    factorise(factor)
    assert factor.data_ptr() == place
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix))
    torch.testing.assert_close(matrix @ solved(factor, right), right)
    with pytest.raises(torch.linalg.LinAlgError):
        factorise(-matrix)


@given(st.integers(0, 10**6))
def test_leaving_out_one_feature_leaves_out_the_one_that_costs_least(seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.cat([torch.randn(200, 6, generator=generator), torch.ones(200, 1)], dim=1).double()
    mixed = features @ torch.randn(7, 3, generator=generator).double()
    targets = mixed + torch.randn(200, 3, generator=generator).double()
    sums, prior = RidgeSums.of(features, targets), torch.zeros(7, 3, dtype=torch.float64)
    kept = most_useful(sums, prior, 5, ridge=1e-9)

    def lost(left):
        solution = torch.linalg.lstsq(features[:, left], targets).solution
        return float((targets - features[:, left] @ solution).square().sum())

    costs = {left: lost([k for k in range(7) if k != left]) for left in range(6)}
    (missing,) = set(range(7)) - set(kept.tolist())
    assert costs[missing] <= min(costs.values()) * (1 + 1e-6)
    assert kept[-1] == 6


def test_a_copy_of_a_feature_costs_nothing_to_leave_out():
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    features = torch.cat([own, own[:, :3], torch.ones(300, 1, dtype=torch.float64)], dim=1)
    targets = own @ torch.randn(4, 2, generator=generator, dtype=torch.float64)
    sums, prior = RidgeSums.of(features, targets), torch.zeros(8, 2, dtype=torch.float64)
    kept = most_useful(sums, prior, 4)
    assert {index % 4 for index in kept[:-1].tolist()} == {0, 1, 2, 3}
    best = ridge_path(sums.at(kept), sums.at(kept), prior[kept])
    assert sums.at(kept).r2(best.weight) > 0.999
