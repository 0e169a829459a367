"""The polynomial taken apart: against autograd, against the dense expansion, and against the outside oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.closed_form.support import OUT, WIDTH, random_block


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


def test_a_direction_of_another_width_is_refused():
    with pytest.raises(ValueError, match="5 entries"):
        random_block(2, True).expand().linear(torch.ones(4))
