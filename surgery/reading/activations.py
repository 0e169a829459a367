"""Which features fire on which tokens, held by feature: a few numbers for each token, not one for each feature."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activations:
    """A sparse matrix of (tokens, n), column after column.

    Attributes:
        tokens: its rows.
        bounds: feature i has the entries bounds[i] to bounds[i + 1], (n + 1,).
        rows, values: token and activation of each entry, (entries,), float32.
    """

    tokens: int
    bounds: Tensor
    rows: Tensor
    values: Tensor

    @staticmethod
    def of(parts: Iterable[Tensor]) -> Activations:
        """From dense rows (some tokens, n), one part after another."""
        rows, features, values, tokens, size = [], [], [], 0, 0
        for part in parts:
            row, feature = part.nonzero(as_tuple=True)
            rows.append(row + tokens)
            features.append(feature)
            values.append(part[row, feature].float())
            tokens, size = tokens + len(part), part.shape[1]
        feature = torch.cat(features)
        order = feature.argsort(stable=True)
        bounds = torch.cat([order.new_zeros(1), torch.bincount(feature, minlength=size).cumsum(0)])
        return Activations(tokens, bounds, torch.cat(rows)[order], torch.cat(values)[order])

    @property
    def size(self) -> int:
        """n."""
        return len(self.bounds) - 1

    @property
    def features(self) -> Tensor:
        """The feature of each entry, (entries,)."""
        return torch.arange(self.size).repeat_interleave(self.bounds.diff())

    def columns(self, features: Tensor) -> Tensor:
        """Dense columns of some features, (tokens, k)."""
        found = self.values.new_zeros(self.tokens, len(features))
        for place, feature in enumerate(features.tolist()):
            at = slice(int(self.bounds[feature]), int(self.bounds[feature + 1]))
            found[self.rows[at], place] = self.values[at]
        return found

    def column(self, feature: int) -> Tensor:
        """One of them, (tokens,), float64."""
        return self.columns(torch.tensor([feature]))[:, 0].double()

    def on(self, mask: Tensor) -> Activations:
        """Of the tokens of a mask alone, (tokens,) bool, all others 0."""
        kept = mask[self.rows]
        counts = torch.zeros(self.size, dtype=torch.long).index_add(
            0, self.features[kept], torch.ones_like(self.rows[kept])
        )
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Activations(self.tokens, bounds, self.rows[kept], self.values[kept])

    def scaled(self, factors: Tensor) -> Activations:
        """Each token's times a factor, (tokens,)."""
        return Activations(self.tokens, self.bounds, self.rows, self.values * factors[self.rows].float())

    def counts(self) -> Tensor:
        """On how many tokens each feature fires, (n,)."""
        return self.bounds.diff()

    def usual(self) -> Tensor:
        """Root mean square of each feature where it fires, (n,); 0 where it never does."""
        squares = self.values.new_zeros(self.size).index_add(0, self.features, self.values.square())
        return (squares / self.counts().clamp_min(1)).sqrt()

    def times(self, directions: Tensor) -> Tensor:
        """activations · directions, (n, d) → (tokens, d)."""
        place = torch.stack((self.rows, self.features))
        shape = (self.tokens, self.size)
        matrix = torch.sparse_coo_tensor(place, self.values.to(directions), shape, check_invariants=True)
        found: Tensor = torch.sparse.mm(matrix, directions)
        return found
