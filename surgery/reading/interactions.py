"""A block's quadratic form between the features of a dictionary: which two together write a direction.

With x = m + Σ a_i d_i the scalar w·f is, up to what is higher than quadratic,

    w·f(x) = w·f(m) + Σ a_i β·d_i + Σ a_i² d_iᵀΓd_i + Σ_{i<j} a_i a_j 2 d_iᵀΓd_j,   β, Γ about m

(after Pearce et al., arXiv 2410.08417, who read a bilinear language model so). A term is one feature (its linear and
square part together) or a pair. Nothing of n × n is ever held: pairs are looked through a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.closed_form.block_polynomial import Expansion
from surgery.reading.activations import Activations
from surgery.reading.spectrum import DENSE_LIMIT

ROWS = 512  # features whose pairs with all others are looked at together
SPARSE = 0.05  # share of activations other than 0 below which their moments are taken as those of sparse matrices
KEPT = 5000  # terms that are kept for the curve
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
TOGETHER = 256  # terms whose values over the text are held at once
RANKS = ("text", "weights")


@dataclass(frozen=True)
class FeatureForm:
    """w·f in features.

    Attributes:
        constant: w·f(m).
        linear, square: β·d_i and d_iᵀΓd_i, (n,).
        read: d_iᵀΓ, (n, d).
        directions: d_i, (n, d).
    """

    constant: float
    linear: Tensor
    square: Tensor
    read: Tensor
    directions: Tensor

    @staticmethod
    def of(expansion: Expansion, w: Tensor, directions: Tensor) -> FeatureForm:
        """For an output direction w, (out,), and the features' directions, (n, d), about the expansion's point."""
        form, directions = expansion.quadratic(w), directions.to(expansion.point)
        if form.size <= DENSE_LIMIT:
            read = directions @ form.dense()
        else:
            read = torch.cat([(form @ rows.T).T for rows in directions.split(ROWS)])
        constant = float(expansion.constant @ w.to(expansion.constant))
        return FeatureForm(constant, directions @ expansion.linear(w), (read * directions).sum(-1), read, directions)

    def weights(self, first: Tensor, second: Tensor) -> Tensor:
        """2 d_iᵀΓd_j for pairs of features, (k,) each → (k,)."""
        return 2 * (self.read[first] * self.directions[second]).sum(-1)


@dataclass(frozen=True)
class Terms:
    """The strongest terms, strongest first.

    Attributes:
        first, second: features of each, (k,); a single feature has itself twice.
        weight: 2 d_iᵀΓd_j of a pair, d_iᵀΓd_i of a single feature, (k,).
        strength: signed; on text: standard deviation of what the term writes over the text; by weights: what it writes
            where both features fire at their usual size (root mean square where they fire), (k,).
        total: sum of squared strengths over all terms.
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    strength: Tensor
    total: float

    @property
    def share(self) -> Tensor:
        """Squared strength ÷ the sum over all terms, (k,)."""
        return self.strength.square() / max(self.total, 1e-300)

    def split(self, count: int) -> tuple[Terms, Terms]:
        """The `count` strongest single features, and the `count` strongest pairs."""
        alone = self.first == self.second
        return self._only(alone.nonzero()[:count, 0]), self._only((~alone).nonzero()[:count, 0])

    def _only(self, at: Tensor) -> Terms:
        return Terms(self.first[at], self.second[at], self.weight[at], self.strength[at], self.total)


def strongest(
    form: FeatureForm, activations: Activations, fitted: Tensor, count: int = KEPT, by: str = "text"
) -> Terms:
    """The `count` terms of largest strength on the tokens `fitted`, (tokens,) bool; features that do not fire there are
    left out.

    Ranked in float32; weights are float64. Cost O(n² d) for n features that fire, and O(n² · tokens) where activations
    are not sparse; memory O(n (d + tokens)).
    """
    there = activations.on(fitted)
    firing = there.counts().nonzero()[:, 0]
    a, usual = there.columns(firing)[fitted], there.usual()[firing]
    linear, square = form.linear[firing].float(), form.square[firing].float()
    single = linear * usual + square * usual**2
    if by == "text":
        values = (part * one + part.square() * two for part, one, two in _columns(a, linear, square))
        single = torch.cat([part.std(0, correction=0) for part in values] or [single]).copysign(single)
    best = _Best(count)
    best.add(firing, firing, single, float(single.double().square().sum()))
    read, directions = form.read[firing].float(), form.directions[firing].float()
    for start in range(0, len(firing), ROWS):
        rows, columns = slice(start, start + ROWS), slice(start, None)
        strength = 2 * read[rows] @ directions[columns].T
        if by == "text":
            strength *= _spread_together(a[:, rows], a[:, columns])
        else:
            strength *= usual[rows, None] * usual[columns]
        best.add_matrix(firing[rows], firing[columns], torch.triu(strength, 1))  # each pair once
    first, second, strength = best.kept
    alone = first == second
    weight = form.weights(first, second) * torch.where(alone, 0.5, 1.0)
    return Terms(first, second, weight, strength.double(), best.total)


def _columns(a: Tensor, *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`ROWS` features at a time: their activations, and their part of every vector."""
    for at in torch.arange(a.shape[1]).split(ROWS):
        if len(at):
            yield a[:, at], *(vector[at] for vector in vectors)


def _spread_together(left: Tensor, right: Tensor) -> Tensor:
    """Standard deviation of a_i a_j over tokens, for activations (tokens, m) and (tokens, n) → (m, n)."""
    square, mean = (
        _sparse(part.T) @ other / len(left) for part, other in ((left.square(), right.square()), (left, right))
    )
    return square.sub_(mean.square_()).clamp_min_(0).sqrt_()


def _sparse(matrix: Tensor) -> Tensor:
    dense = matrix.count_nonzero() >= SPARSE * matrix.numel()
    return matrix if bool(dense) else matrix.to_sparse()


class _Best:
    """The strongest terms so far: first and second feature and strength, strongest first, and the sum of squares."""

    def __init__(self, count: int) -> None:
        self.count, self.total = count, 0.0
        none = torch.zeros(0, dtype=torch.long)
        self.kept = (none, none, torch.zeros(0))

    def add(self, first: Tensor, second: Tensor, strength: Tensor, total: float) -> None:
        parts = [torch.cat(both) for both in zip(self.kept, (first, second, strength), strict=True)]
        order = parts[-1].abs().argsort(descending=True, stable=True)[: self.count]
        self.kept = (parts[0][order], parts[1][order], parts[2][order])
        self.total += total

    def add_matrix(self, first: Tensor, second: Tensor, strength: Tensor) -> None:
        flat = strength.flatten()
        place = flat.abs().topk(min(self.count, len(flat))).indices
        place = place[flat[place] != 0]
        row, column = place // strength.shape[1], place % strength.shape[1]
        self.add(first[row], second[column], flat[place], float(flat.square().sum(dtype=torch.float64)))


def written(form: FeatureForm, terms: Terms, activations: Activations) -> Iterator[Tensor]:
    """What each term writes, (tokens, up to `TOGETHER`) at a time: a_i a_j weight, or a_i β·d_i + a_i² weight."""
    for part in torch.arange(len(terms.first)).split(TOGETHER):
        i, j = terms.first[part], terms.second[part]
        a = activations.columns(i).double()
        alone = (i == j).to(a)
        yield a * activations.columns(j).double() * terms.weight[part] + alone * a * form.linear[i]


@dataclass(frozen=True)
class Agreement:
    """How well a guess tells a value over tokens."""

    r2: float
    correlation: float

    @staticmethod
    def of(value: Tensor, guess: Tensor) -> Agreement:
        """0 each where either is constant."""
        away, other = value - value.mean(), guess - guess.mean()
        spread = float(away.square().sum())
        both = (spread * float(other.square().sum())) ** 0.5
        r2 = 1 - float((value - guess).square().sum()) / spread if spread > 0 else 0.0
        return Agreement(r2, float((away * other).sum()) / both if both > 0 else 0.0)


def curve(
    form: FeatureForm, terms: Terms, activations: Activations, value: Tensor, fitted: Tensor, judged: Tensor
) -> list[tuple[int, Agreement]]:
    """How well the strongest terms alone tell w·f, by their number.

    Terms that are left out count by their mean.

    Args:
        activations, value: (tokens, n), and w·f (tokens,).
        fitted, judged: which tokens the terms were ranked on, whose means are taken, and which ones judge, (tokens,),
            bool.
    """
    wanted = value[judged]
    guess = value[fitted].mean().expand(len(wanted)).clone()
    found, done = [], 0
    for part in written(form, terms, activations):
        steps = [step for step in STEPS if done < step <= done + part.shape[1]]
        running = (part[judged] - part[fitted].mean(0)).cumsum(-1)
        found += [(step, Agreement.of(wanted, guess + running[:, step - done - 1])) for step in steps]
        guess, done = guess + running[:, -1], done + part.shape[1]
    if done and (not found or found[-1][0] != done):
        found.append((done, Agreement.of(wanted, guess)))
    return found
