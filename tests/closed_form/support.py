"""What the tests of closed_form share."""

import torch

from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine

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
