"""The polynomial taken apart: against autograd, against the dense expansion, and against the outside oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine
from surgery.reading.spectrum import spectrum
from tests.closed_form.test_oracle import FILE, factors, tensors

WIDTH, HIDDEN, OUT = 6, 9, 5


def random_block(degree, gated, seed=0, width=WIDTH, hidden=HIDDEN):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    up = Affine(draw(hidden, width), draw(hidden)) if gated else None
    b = draw(hidden, degree) if gated else None
    return BlockPolynomial(
        Affine(draw(hidden, width), draw(hidden)), up, draw(hidden, degree + 1), b, Affine(draw(OUT, hidden), draw(OUT))
    )


def case(degree, gated, seed):
    block = random_block(degree, gated, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    point, w = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (WIDTH, OUT))
    return block, point, w


@given(degree=st.integers(1, 5), gated=st.booleans(), seed=st.integers(0, 99))
def test_the_expansion_is_taylors(degree, gated, seed):
    block, point, w = case(degree, gated, seed)
    expansion = block.expand(point)

    def q(x):
        return block(x[None])[0] @ w

    gradient = torch.autograd.functional.jacobian(q, point)
    hessian = torch.autograd.functional.hessian(q, point)
    torch.testing.assert_close(expansion.constant @ w, q(point))
    torch.testing.assert_close(expansion.linear(w), gradient)
    torch.testing.assert_close(expansion.jacobian().T @ w, gradient)
    torch.testing.assert_close(expansion.quadratic(w).dense(), hessian / 2)


@given(degree=st.integers(1, 4), gated=st.booleans(), seed=st.integers(0, 99))
def test_the_parts_add_up_and_the_rest_begins_at_degree_three(degree, gated, seed):
    block, point, w = case(degree, gated, seed)
    x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expansion = block.expand(point)
    linear, quadratic, higher = expansion.parts(w, x)
    torch.testing.assert_close(linear + quadratic + higher, (block(x) - block(point[None])) @ w)
    away = x - point
    torch.testing.assert_close(quadratic, ((away @ expansion.quadratic(w).dense()) * away).sum(-1))
    scale = (block(x) @ w).abs().max()
    assert (higher.abs().max() < 1e-10 * scale) == (degree <= 2)


@given(gated=st.booleans(), seed=st.integers(0, 99), whitened=st.booleans())
def test_the_operator_is_its_matrix(gated, seed, whitened):
    block, point, w = case(3, gated, seed)
    root = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = block.expand(point).quadratic(w, root if whitened else None)
    dense = matrix.dense()
    torch.testing.assert_close(dense, dense.T)
    torch.testing.assert_close(matrix @ torch.eye(WIDTH).double(), dense)


@given(gated=st.booleans(), seed=st.integers(0, 99))
def test_the_gram_of_the_outputs(gated, seed):
    block, point, _ = case(3, gated, seed)
    expansion = block.expand(point)
    gammas = torch.stack([expansion.quadratic(w).dense() for w in torch.eye(OUT).double()]).flatten(1)
    torch.testing.assert_close(expansion.output_gram(chunk=4), gammas @ gammas.T)


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


def test_a_direction_of_another_width_is_refused():
    with pytest.raises(ValueError, match="5 entries"):
        random_block(2, True).expand().linear(torch.ones(4))
