"""Eigenpairs of a quadratic form: dense where that is cheap, by Lanczos iteration above."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.closed_form.block_polynomial import Quadratic
from surgery.errors import SurgeryError

DENSE_LIMIT = 2048  # width up to which the whole matrix is built and decomposed
CHUNK = 256  # columns that are held at once above it


@dataclass(frozen=True)
class Spectrum:
    """The leading eigenpairs of a symmetric matrix Γ, by |λ|, descending.

    An eigenvector's sign is arbitrary: its entry of largest magnitude is made positive.

    Attributes:
        values: λ, (k,).
        vectors: unit eigenvectors in columns, (d, k).
        square: ‖Γ‖²_F = Σ λ² over the whole spectrum.
        effective_rank: (Σ λ²)² ÷ Σ λ⁴, over the whole spectrum: how many eigenvalues share the work; 0 for Γ = 0.
        trace: Σ λ.
    """

    values: Tensor
    vectors: Tensor
    square: float
    effective_rank: float
    trace: float

    @property
    def shares(self) -> Tensor:
        """λ² ÷ ‖Γ‖²_F of each pair: how much of the spectrum it explains, (k,)."""
        return self.values.square() / max(self.square, 1e-300)


def spectrum(matrix: Quadratic, count: int, dense_limit: int = DENSE_LIMIT) -> Spectrum:
    """The `count` eigenpairs of largest magnitude.

    Up to a width of `dense_limit` by LAPACK on the d × d matrix; above by ARPACK (scipy), which needs products alone:
    then memory is that of the factors and a few vectors, and ‖Γ‖²_F and Σ λ⁴ are summed over columns.
    """
    d = matrix.size
    count = min(count, d)
    if d <= dense_limit or count >= d - 1:
        values, vectors = torch.linalg.eigh(matrix.dense())
        order = values.abs().argsort(descending=True)
        square, fourth = float(values.square().sum()), float(values.square().square().sum())
        trace = float(values.sum())
        values, vectors = values[order[:count]], vectors[:, order[:count]]
    else:
        values, vectors = _lanczos(matrix, count)
        square, fourth, trace = _column_sums(matrix)
    rank = square**2 / fourth if fourth > 0 else 0.0
    return Spectrum(values, oriented(vectors), square, rank, trace)


def oriented(vectors: Tensor) -> Tensor:
    """Columns with the sign that makes the entry of largest magnitude positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors)


def _lanczos(matrix: Quadratic, count: int) -> tuple[Tensor, Tensor]:
    try:
        import numpy as np
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise SurgeryError(
            f"a block {matrix.size} wide needs an iterative eigensolver", fix="pip install 'polysurgery[explain]'"
        ) from error
    like = matrix.gate

    def product(x: np.ndarray) -> np.ndarray:
        column = torch.from_numpy(np.ascontiguousarray(x)).to(like).reshape(-1, 1)
        return (matrix @ column)[:, 0].double().cpu().numpy()  # type: ignore[no-any-return]

    operator = LinearOperator((matrix.size, matrix.size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(matrix.size)  # so that the result is always the same
    values, vectors = eigsh(operator, k=count, which="LM", v0=start)
    order = np.argsort(-np.abs(values))
    return torch.from_numpy(values[order].copy()).to(like), torch.from_numpy(vectors[:, order].copy()).to(like)


def _column_sums(matrix: Quadratic) -> tuple[float, float, float]:
    """‖Γ‖²_F, ‖Γ²‖²_F and tr Γ."""
    square = fourth = trace = 0.0
    for rows in torch.arange(matrix.size).split(CHUNK):
        unit = matrix.gate.new_zeros(matrix.size, len(rows))
        unit[rows, torch.arange(len(rows))] = 1
        once = matrix @ unit
        square += float(once.square().sum())
        trace += float(once[rows, torch.arange(len(rows))].sum())
        fourth += float((matrix @ once).square().sum())
    return square, fourth, trace
