"""Every kind of block has a class that stores its polynomial."""

import pytest

from surgery.blocks.block import Block, ExpertsBlock, FusedBlock, GatedBlock, HalfBlock, PlainBlock
from surgery.errors import ModelError
from surgery.models.saved_blocks import KINDS, saved_block


def every_kind(kind=Block):
    return {kind for below in kind.__subclasses__() for kind in (below, *every_kind(below))}


def test_no_kind_of_block_is_forgotten():
    assert every_kind() == {GatedBlock, FusedBlock, PlainBlock, HalfBlock, ExpertsBlock}


@pytest.mark.parametrize("kind", sorted(every_kind(), key=lambda kind: kind.__name__))
@pytest.mark.parametrize(("degree", "form"), [(1, "custom"), (2, "custom"), (2, "native"), (5, "custom")])
def test_whatever_is_fitted_can_be_stored(kind, degree, form):
    block = kind("layers.0.mlp", ("layers.0.mlp.up",), "layers.0.mlp.down", "layers.0.mlp.act", "gelu", 3, 4, 3, 24)
    assert block.saved_kind(degree, form) in KINDS


def test_an_unknown_kind_is_refused():
    with pytest.raises(ModelError, match="unknown kind of polynomial block 'cubist'"):
        saved_block({"kind": "cubist", "path": "layers.0.mlp"})
