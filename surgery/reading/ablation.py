"""Taking away what the polynomial says matters, and asking the network itself.

x ↦ (I − Σ_{i≤k} u_i u_iᵀ) x, with the u_i read from the polynomial's coefficients: the right singular vectors of the
linear part β, or the eigenvectors of the quadratic parts Γ. If the polynomial explains the network, a few of them
suffice to break it. After Belrose & Rigg, arXiv 2502.01032.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.closed_form.block_polynomial import Expansion


def linear_directions(expansion: Expansion) -> Tensor:
    """Right singular vectors of β in columns, by singular value; (d, min(d, out))."""
    right: Tensor = torch.linalg.svd(expansion.jacobian(), full_matrices=False)[2]
    return right.T


def quadratic_directions(expansion: Expansion, outputs: Tensor) -> Tensor:
    """Eigenvectors of Γ for each output direction, pooled by |λ| and made orthonormal in that order; (d, rank).

    Args:
        outputs: output directions in rows, (k, out).
    """
    values, vectors = torch.linalg.eigh(torch.stack([expansion.quadratic(w).dense() for w in outputs]))
    pooled = vectors.transpose(1, 2).flatten(0, 1)[values.abs().flatten().argsort(descending=True)]
    kept: list[Tensor] = []
    for row in pooled:
        rest = row
        for _ in range(2):  # once more, against rounding
            for other in kept:
                rest = rest - (rest @ other) * other
        if float(rest.norm()) > 1e-6:
            kept.append(rest / rest.norm())
        if len(kept) == len(row):
            break
    return torch.stack(kept, dim=1)


def project_out(x: Tensor, directions: Tensor) -> Tensor:
    """x less its components along orthonormal columns, (d, k); x of shape (tokens, d)."""
    u = directions.to(x)
    return x - (x @ u) @ u.T
