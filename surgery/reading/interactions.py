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
from surgery.reading.spectrum import DENSE_LIMIT

ROWS = 512  # features whose pairs with all others are looked at together
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


def strongest(form: FeatureForm, activations: Tensor, count: int = KEPT, by: str = "text") -> Terms:
    """The `count` terms of largest strength, for activations (tokens, n); features that never fire are left out.

    Cost O(n² (d + tokens)) for n features that fire, memory O(n (d + tokens)).
    """
    firing = (activations != 0).any(0).nonzero()[:, 0]
    a = activations[:, firing]
    usual = (a.square().sum(0) / (a != 0).sum(0)).sqrt().double()
    linear, square = form.linear[firing], form.square[firing]
    if by == "text":
        values = a.double() * linear + a.double().square() * square
        single = (values - values.mean(0)).square().mean(0).sqrt()
        single = single.copysign(linear * usual + square * usual**2)
    else:
        single = linear * usual + square * usual**2
    best = _Best(count)
    best.add(firing, firing, square, single)
    squares, read, directions = a.square(), form.read[firing], form.directions[firing]
    for start in range(0, len(firing), ROWS):
        rows, columns = slice(start, start + ROWS), slice(start, None)
        weight = 2 * read[rows] @ directions[columns].T
        if by == "text":
            mean = a[:, rows].T @ a[:, columns] / len(a)
            together = (squares[:, rows].T @ squares[:, columns] / len(a) - mean.square()).clamp_min(0).sqrt()
        else:
            together = usual[rows, None] * usual[columns]
        strength = torch.triu(weight * together, 1)  # each pair once
        best.add_matrix(firing[rows], firing[columns], weight, strength)
    return best.terms()


class _Best:
    """The strongest terms so far."""

    def __init__(self, count: int) -> None:
        self.count, self.total = count, 0.0
        self.kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, first: Tensor, second: Tensor, weight: Tensor, strength: Tensor) -> None:
        self.total += float(strength.square().sum())
        self._keep(first, second, weight, strength)

    def add_matrix(self, first: Tensor, second: Tensor, weight: Tensor, strength: Tensor) -> None:
        self.total += float(strength.square().sum())
        place = strength.abs().flatten().topk(min(self.count, strength.numel())).indices
        place = place[strength.flatten()[place] != 0]
        row, column = place // strength.shape[1], place % strength.shape[1]
        self._keep(first[row], second[column], weight[row, column], strength[row, column])

    def _keep(self, *new: Tensor) -> None:
        parts = [torch.cat(both) for both in zip(*self.kept, new, strict=True)]
        order = parts[-1].abs().argsort(descending=True, stable=True)[: self.count]
        first, second, weight, strength = (part[order] for part in parts)
        self.kept = [(first, second, weight, strength)]

    def terms(self) -> Terms:
        return Terms(*self.kept[0], self.total)


def written(form: FeatureForm, terms: Terms, activations: Tensor) -> Iterator[Tensor]:
    """What each term writes, (tokens, up to `TOGETHER`) at a time: a_i a_j weight, or a_i β·d_i + a_i² weight."""
    for part in torch.arange(len(terms.first)).split(TOGETHER):
        i, j = terms.first[part], terms.second[part]
        a = activations[:, i].double()
        alone = (i == j).to(a)
        yield a * activations[:, j].double() * terms.weight[part] + alone * a * form.linear[i]


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
    form: FeatureForm, terms: Terms, fitted: tuple[Tensor, Tensor], judged: tuple[Tensor, Tensor]
) -> list[tuple[int, Agreement]]:
    """How well the strongest terms alone tell w·f, by their number.

    Terms that are left out count by their mean.

    Args:
        fitted, judged: (activations (tokens, n), values of w·f (tokens,)): of the text that the terms were ranked on,
            which gives the means, and of other text, which judges.
    """
    guess = fitted[1].mean().expand(len(judged[1])).clone()
    found, done = [], 0
    for here, there in zip(written(form, terms, fitted[0]), written(form, terms, judged[0]), strict=True):
        steps = [step for step in STEPS if done < step <= done + there.shape[1]]
        running = (there - here.mean(0)).cumsum(-1)
        found += [(step, Agreement.of(judged[1], guess + running[:, step - done - 1])) for step in steps]
        guess, done = guess + running[:, -1], done + there.shape[1]
    if done and (not found or found[-1][0] != done):
        found.append((done, Agreement.of(judged[1], guess)))
    return found
