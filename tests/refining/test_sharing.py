"""Teacher and student in one memory."""

import pytest
import torch

import surgery
from surgery.errors import ModelError
from surgery.refining.parameters import named_trainable, names_inside, twin_block_paths
from surgery.refining.student import share_tensors
from tests import tiny


def test_one_model_in_memory(place):
    """Every tensor that is not trained is shared; the teacher's outputs are the original's all the same."""
    twin, teacher, original = (surgery.load(str(place / name)) for name in ("native", "llama", "llama"))
    trained = set(named_trainable(twin, "block"))
    saved = share_tensors(twin, teacher, trained, names_inside(twin_block_paths(twin)))
    ours = {p.data_ptr() for p in twin.parameters()}
    shared = [p for p in teacher.parameters() if p.data_ptr() in ours]
    assert saved == sum(p.numel() * 4 for p in shared)
    assert all(".mlp." in name for name, p in teacher.named_parameters() if p.data_ptr() not in ours)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(teacher(input_ids=ids).logits, original(input_ids=ids).logits)


def test_another_teacher_is_refused(place):
    twin = surgery.load(str(place / "native"))
    trained = set(named_trainable(twin, "block"))
    with pytest.raises(ModelError, match="differs between the teacher and the twin"):
        share_tensors(twin, tiny.make("llama", seed=7), trained, names_inside(twin_block_paths(twin)))
