"""Eigenpairs of a block's quadratic part."""

import pytest
import torch

from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine
from surgery.reading.spectrum import spectrum
from tests.closed_form.support import OUT, random_block
from tests.closed_form.test_oracle import FILE, factors, tensors


def test_lanczos_finds_what_the_dense_solver_finds():
    pytest.importorskip("scipy")
    block = random_block(2, True, width=40, hidden=60)
    matrix = block.expand().quadratic(torch.ones(OUT, dtype=torch.float64))
    dense, iterative = spectrum(matrix, 5), spectrum(matrix, 5, dense_limit=0)
    torch.testing.assert_close(iterative.values, dense.values, rtol=1e-10, atol=0)
    torch.testing.assert_close(iterative.vectors, dense.vectors, rtol=0, atol=1e-8)
    for name in ("square", "effective_rank", "trace"):
        assert getattr(iterative, name) == pytest.approx(getattr(dense, name))


def test_eigenpairs_are_eigenpairs_ordered_and_oriented():
    block = random_block(2, True, width=12, hidden=30)
    matrix = block.expand().quadratic(torch.ones(OUT, dtype=torch.float64))
    found = spectrum(matrix, 12)
    torch.testing.assert_close(matrix.dense() @ found.vectors, found.vectors * found.values)
    assert (found.values.abs().diff() <= 0).all()
    assert float(found.shares.sum()) == pytest.approx(1)
    assert (found.vectors.gather(0, found.vectors.abs().argmax(0, keepdim=True)) > 0).all()
    assert 1 <= found.effective_rank <= 12


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_effective_rank_counts_equal_eigenvalues(rank):
    eye = torch.eye(6, dtype=torch.float64)[:rank]
    zero = torch.zeros(rank, dtype=torch.float64)
    squares = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).expand(rank, 3)
    block = BlockPolynomial(Affine(eye, zero), None, squares, None, Affine(zero[None] + 1, zero[:1]))
    found = spectrum(block.expand().quadratic(torch.ones(1, dtype=torch.float64)), 3)
    assert found.effective_rank == pytest.approx(rank)


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in FILE.files if key.endswith("/gamma")}))
def test_eigenpairs_of_the_oracles_gamma(name):
    """Every output's eigenpairs, from the factors, against a dense solver on polyapprox's own Γ."""
    data = tensors(name)
    units, gate, up, readout = factors(name, data, 2)
    expansion = BlockPolynomial(gate, up, units.a, units.b, readout).expand()
    d = expansion.polynomial.width
    for w, theirs in zip(torch.eye(len(data["gamma"])).double(), data["gamma"], strict=True):
        found = spectrum(expansion.quadratic(w), d)
        rebuilt = found.vectors * found.values @ found.vectors.T
        torch.testing.assert_close(rebuilt, theirs, rtol=0, atol=1e-7)
        expected = torch.linalg.eigvalsh(theirs)
        torch.testing.assert_close(found.values.sort().values, expected, rtol=0, atol=1e-7)
