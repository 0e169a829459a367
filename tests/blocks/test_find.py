"""Blocks are found by structure, confirmed by recomputation, and what is not understood is named."""

import pytest
import torch
from torch import nn

from surgery.blocks.find import survey
from surgery.blocks.verify import verify_all
from tests import tiny
from tests.blocks.support import run


@pytest.mark.parametrize("name", sorted(tiny.MAKERS))
def test_every_shape_is_found_and_confirmed(name, ids):
    model = tiny.make(name)
    found = survey(model)
    assert len(found.blocks) == tiny.BLOCKS.get(name, tiny.LAYERS)
    assert not found.left_alone
    assert {block.kind for block in found.blocks} == {tiny.KINDS.get(name, "plain")}
    assert {(b.width, b.hidden, b.out) for b in found.blocks} == {(tiny.WIDTH, tiny.HIDDEN, tiny.WIDTH)}
    with torch.no_grad():
        confirmed = verify_all(model, found.blocks, run(model, name, ids))
    assert [block.path for block in confirmed] == [block.path for block in found.blocks]
    assert all(block.residual is not None for block in confirmed)


def test_what_is_not_a_known_mixture_is_named_and_left_alone():
    import transformers

    config = transformers.JetMoeConfig(
        **tiny.COMMON, num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2
    )
    found = survey(transformers.JetMoeForCausalLM(config))
    assert found.blocks == ()
    assert {reason for _, reason in found.left_alone} == {"mixture of experts in a form that is not known"}


def test_a_gate_on_a_side_input_is_not_taken_for_the_layers_block():
    import transformers

    from evals.architectures.tiny_models import tiny as build

    found = survey(build(transformers.Gemma3nForCausalLM, "gemma3n_text"))
    assert [block.path.rpartition(".")[2] for block in found.blocks] == ["mlp", "mlp"]


def test_a_model_without_blocks_has_none():
    found = survey(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert found.blocks == ()


def test_the_survey_needs_no_weights():
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.COMMON))
    assert len(survey(model).blocks) == tiny.LAYERS
