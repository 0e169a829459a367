"""Ridge regression for the readout: sums that stream, and a strength chosen on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from surgery.closed_form.moments import at_least_float32

JITTER = 1e-13  # of the constant's own sum: keeps a Cholesky factor defined, changes no digit
ROUNDS, ROUNDS_RIDGE = 8, 1e-2  # of leaving features out; what is lost there is counted next to unpulled
USUAL_RIDGE = 0.3
RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
DIRECTIONS = 64  # of the output space, drawn at random, on which strengths are compared
COLUMNS = 512  # outputs that are solved for at once
PARTS = 4  # the Gram matrix is computed in 4 × 4 tiles, of which 10 suffice


@dataclass(frozen=True)
class RidgeSums:
    """Sums for regressing targets on features: Fᵀ W F, Fᵀ W T, and what R² needs; float64, added to in place.

    Attributes:
        weight: Σ w, a scalar.
        gram: shape (p, p), filled on and above the diagonal tiles only; the last feature is the constant 1.
        cross: shape (p, q).
        target_square: Σ w t², shape (q,).
    """

    weight: Tensor
    gram: Tensor
    cross: Tensor
    target_square: Tensor

    @staticmethod
    def zeros(features: int, outputs: int, device: torch.device | None = None) -> RidgeSums:
        """Sums over no rows."""

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return RidgeSums(empty(), empty(features, features), empty(features, outputs), empty(outputs))

    @staticmethod
    def of(features: Tensor, targets: Tensor) -> RidgeSums:
        """Sums over rows; see :meth:`add_rows`."""
        sums = RidgeSums.zeros(features.shape[1], targets.shape[1], features.device)
        sums.add_rows(features, targets)
        return sums

    def add_rows(self, features: Tensor, targets: Tensor) -> None:
        """Adds rows: features (rows, p), ending in the constant, and targets (rows, q).

        Weighted rows come scaled by √w on both sides. Products are formed in the given precision, float32 at least.
        """
        features, targets = at_least_float32(features), at_least_float32(targets)
        self.weight.add_(features[:, -1].double().square().sum())
        edges = [features.shape[1] * k // PARTS for k in range(PARTS + 1)]
        for k in range(PARTS):
            rows, tail = slice(edges[k], edges[k + 1]), slice(edges[k], None)
            self.gram[rows, tail].add_(features[:, rows].T @ features[:, tail])
        self.cross.add_(features.T @ targets)
        self.target_square.add_(targets.double().square().sum(0))

    def __add__(self, other: RidgeSums) -> RidgeSums:
        return RidgeSums(
            self.weight + other.weight,
            self.gram + other.gram,
            self.cross + other.cross,
            self.target_square + other.target_square,
        )

    def parts(self) -> tuple[Tensor, ...]:
        """All that is summed."""
        return self.weight, self.gram, self.cross, self.target_square

    def at(self, kept: Tensor) -> RidgeSums:
        """The same sums for some of the features, by number; the constant stays the last."""
        gram = self.full_gram()[kept][:, kept]
        return RidgeSums(self.weight, gram, self.cross[kept], self.target_square)

    def full_gram(self) -> Tensor:
        """Fᵀ W F with its lower half filled in, (p, p). In place: this matrix is what takes the memory."""
        edges = [len(self.gram) * k // PARTS for k in range(PARTS + 1)]
        for k in range(PARTS):
            rows, below = slice(edges[k], edges[k + 1]), slice(edges[k + 1], None)
            self.gram[below, rows] = self.gram[rows, below].T
        return self.gram

    def error(self, solution: Tensor, sketch: Tensor) -> float:
        """Σ w ‖Sᵀt − Bᵀf‖² but for a constant, with B of shape (p, k) and S of shape (q, k)."""
        return float((solution * (self.full_gram() @ solution - 2 * (self.cross @ sketch))).sum())

    def r2(self, solution: Tensor) -> float:
        """1 − Σ w ‖t − Bᵀ f‖² ÷ variance of the targets about their mean, over all outputs; B of shape (p, q)."""
        fitted = (solution * (self.full_gram() @ solution)).sum()
        residual = self.target_square.sum() - 2 * (solution * self.cross).sum() + fitted
        variance = self.target_square.sum() - self.cross[-1].square().sum() / self.weight
        return 1 - float(residual / variance.clamp_min(1e-300))


@dataclass(frozen=True)
class HeldRows:
    """Held-out rows as they are: where there are fewer than 2 p of them they are smaller than their Gram matrix.

    Attributes:
        features: (rows, p), scaled by √w.
        targets: (rows, q), likewise.
    """

    features: Tensor
    targets: Tensor

    def at(self, kept: Tensor) -> HeldRows:
        """The same rows for some of the features, by number."""
        return HeldRows(self.features[:, kept], self.targets)

    def error(self, solution: Tensor, sketch: Tensor) -> float:
        """Σ w ‖Sᵀt − Bᵀf‖², with B of shape (p, k) and S of shape (q, k)."""
        features, targets = at_least_float32(self.features), at_least_float32(self.targets)
        missing = features @ solution.to(features) - targets @ sketch.to(targets)
        return float(missing.double().square().sum())


@dataclass(frozen=True)
class RidgeSolution:
    """The re-solved last map.

    Attributes:
        weight: shape (p, q), the constant's row last.
        ridge: λ chosen, as a share of the mean squared feature; None where nothing was re-solved.
        condition: of the regularised normal equations, estimated from the Cholesky factor's diagonal.
    """

    weight: Tensor
    ridge: float | None
    condition: float


def ridge_path(
    fit: RidgeSums,
    held: RidgeSums | HeldRows,
    prior: Tensor,
    ridges: Sequence[float] = RIDGES,
    anchor: tuple[Tensor, Tensor] | None = None,
    free: int = 1,
    counts: Tensor | None = None,
) -> RidgeSolution:
    """min_B Σ w‖t − Bᵀf‖² + λ·n·mean(f²)·‖B − prior‖², with the λ that leaves the smallest held-out residual.

    The path is walked downhill from the usual λ, so most of it is never solved; solutions are compared on a few random
    directions of the output space, which estimates the residual at a tenth of the cost (Johnson and Lindenstrauss).
    Memory: the Gram matrix and one factor of its size.

    Args:
        fit, held: the tokens to fit and to choose on.
        prior: shape (p, q), what B is pulled towards.
        free: how many of the last features (sink units, the constant) are not pulled.
        anchor: features and targets of rows that belong to every fit but to no score (attention sinks); they are added
            to `fit`.
        counts: how much an error of each output counts, (q,); alike where None. It decides on λ alone: for one λ the
            outputs do not depend on each other.
    """
    ordered = sorted(ridges)
    size = float(fit.gram.diagonal()[:-free].mean())
    if anchor is not None:
        fit.add_rows(*anchor)
    system = _Regularised(fit.full_gram(), size, free)
    sketch = _directions(prior)
    if counts is not None:
        sketch = counts.to(sketch)[:, None] * sketch
    begin = prior @ sketch
    seen = fit.cross @ sketch - system.gram @ begin
    scores: dict[int, float] = {}

    def score(index: int) -> float:
        if not 0 <= index < len(ordered):
            return float("inf")
        if index not in scores:
            try:
                scores[index] = held.error(begin + system.solve(ordered[index], seen), sketch)
            except LinAlgError:  # singular to rounding: fewer tokens than features, and too weak a ridge
                scores[index] = float("inf")
        return scores[index]

    best = min(range(len(ordered)), key=lambda index: abs(math.log(ordered[index] / USUAL_RIDGE)))
    step = 1 if score(best + 1) < score(best) else -1
    while score(best + step) < score(best):
        best += step
    solution = prior.clone()
    parts = (matrix.split(COLUMNS, dim=1) for matrix in (solution, fit.cross, prior))
    for into, cross, start in zip(*parts, strict=True):
        into.add_(system.solve(ordered[best], cross - system.gram @ start))
    pivots = system.factor.diagonal().square()
    return RidgeSolution(solution, ordered[best], float(pivots.max() / pivots.min()))


class _Regularised:
    """Fᵀ W F + λ, factorised for one λ at a time; the `free` last features are not pulled."""

    def __init__(self, gram: Tensor, size: float, free: int) -> None:
        self.gram, self.size, self.free = gram, size, free
        self.factor = torch.empty_like(gram)
        self.latest: float | None = None

    def solve(self, ridge: float, right: Tensor) -> Tensor:
        """(Fᵀ W F + λ)⁻¹ B. Raises LinAlgError where the matrix is singular to rounding."""
        if self.latest != ridge:
            self.latest = None
            self.factor.copy_(self.gram)
            diagonal = self.factor.diagonal()
            diagonal[: -self.free] += ridge * self.size
            diagonal[-self.free :] *= 1 + JITTER
            factorise(self.factor)
            self.latest = ridge
        return solved(self.factor, right)


def factorise(matrix: Tensor) -> None:
    """Puts the Cholesky factor L, lower, in the place of L Lᵀ: no second matrix of its size. Raises LinAlgError."""
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix.mT, upper=True, check_errors=True, out=(matrix.mT, info))


def solved(lower: Tensor, right: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ B. (`torch.cholesky_solve` copies L.)"""
    halfway: Tensor = torch.linalg.solve_triangular(lower, right, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(lower.mT, halfway, upper=True)
    return solution


def most_useful(
    fit: RidgeSums,
    prior: Tensor,
    count: int,
    free: int = 1,
    ridge: float = ROUNDS_RIDGE,
    counts: Tensor | None = None,
) -> Tensor:
    """Which `count` features to keep so that little is lost once the others' share is taken over by those kept.

    Backward elimination: with all outputs re-solved, leaving out feature j adds ‖B_j‖² ÷ [(Fᵀ W F + λ)⁻¹]_jj to the
    squared error (Hassibi & Stork, NeurIPS 1992, for many outputs). Exact for one feature, so it goes in rounds.

    Args:
        prior, free, ridge, counts: as in :func:`ridge_path`; the `free` last features are kept beside the `count`.
    Returns:
        their numbers, ascending, (count + free,).
    """
    kept = torch.arange(len(prior), device=prior.device)
    size = float(fit.gram.diagonal()[:-free].mean())
    pull = torch.full_like(prior[:, 0], ridge * size)
    pull[-free:] = JITTER * fit.gram.diagonal()[-free:]
    gram = fit.full_gram().clone()
    gram.diagonal().add_(pull)
    pulled = fit.cross + pull[:, None] * prior
    for round_number in range(ROUNDS):
        left = len(kept) - free
        goal = round(left * (count / left) ** (1 / (ROUNDS - round_number)))
        if goal >= left:
            continue
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[kept][:, kept]))
        solution = inverse @ pulled[kept]
        solution = solution if counts is None else solution * counts.to(solution)
        costs = solution.square().sum(-1) / inverse.diagonal()
        best = costs[:-free].topk(goal).indices.sort().values
        kept = torch.cat([kept[best], kept[-free:]])
    return kept


def _directions(prior: Tensor) -> Tensor:
    outputs = prior.shape[1]
    if outputs <= DIRECTIONS:
        return torch.eye(outputs).to(prior)
    return torch.randn(outputs, DIRECTIONS, generator=torch.Generator().manual_seed(0)).to(prior)
