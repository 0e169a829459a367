"""Blocks are found by structure, confirmed by recomputation, and what is not understood is named."""

import pytest
import torch
from torch import nn

from surgery.blocks.find import survey
from surgery.blocks.verify import verify_all
from surgery.errors import ModelError
from tests import tiny


def run(model, name, ids):
    inputs = tiny.inputs_for(name, ids)
    if name == "vit":
        return lambda: model(pixel_values=inputs["pixel_values"][:2])
    extra = {"decoder_input_ids": ids[:2]} if name.startswith("t5") else {}
    return lambda: model(input_ids=ids[:2], **extra)


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
    parallel_or_post_norm = {"gpt_neox", "phi", "bert", "gemma2"}
    assert all(block.additive == (name not in parallel_or_post_norm) for block in confirmed)


def test_gate_and_up_are_told_apart_by_recomputation(ids):
    """A gate under a misleading name: the survey guesses wrong, the confirmation corrects it."""
    model = tiny.make("llama")
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
        mlp.forward = lambda x, m=mlp: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x))
    found = survey(model)
    assert found.blocks[0].first[0].endswith("gate_proj")
    with torch.no_grad():
        confirmed = verify_all(model, found.blocks, run(model, "llama", ids))
    assert confirmed[0].first[0].endswith("up_proj")


def test_a_clamped_block_fails_its_confirmation(ids):
    model = tiny.make("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj((mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).clamp(-0.1, 0.1))
    with torch.no_grad(), pytest.raises(ModelError, match=r"layers\.1\.mlp") as caught:
        verify_all(model, survey(model).blocks, run(model, "llama", ids))
    assert "--blocks" in str(caught.value)


def test_what_is_not_a_known_mixture_is_named_and_left_alone():
    import transformers

    config = transformers.JetMoeConfig(
        **tiny.COMMON, num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2
    )
    found = survey(transformers.JetMoeForCausalLM(config))
    assert found.blocks == ()
    assert {reason for _, reason in found.left_alone} == {"mixture of experts in a form that is not known"}


def test_a_block_that_is_not_what_it_seems_is_left_alone_and_told(ids):
    import surgery

    model = tiny.make("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj((mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).clamp(-0.1, 0.1))
    twin, report = surgery.convert(model, calibration=ids, length=24)
    assert [row["path"] for row in report.blocks] == ["model.layers.0.mlp"]
    assert report.form == "custom"
    ((path, reason),) = report.left_alone
    assert path == "model.layers.1.mlp"
    assert "something else happens inside it" in reason
    with pytest.raises(ModelError, match=r"layers\.1\.mlp"):
        surgery.convert(twin, calibration=ids, length=24, blocks="0")


def test_an_activation_that_serves_something_else_too_is_not_replaced(ids):
    model = tiny.make("gpt2")
    mlp = model.transformer.h[1].mlp
    mlp.forward = lambda x: mlp.act(mlp.c_proj(mlp.act(mlp.c_fc(x))))
    with torch.no_grad(), pytest.raises(ModelError, match="applied elsewhere too"):
        verify_all(model, survey(model).blocks, run(model, "gpt2", ids))


def test_an_activation_called_as_a_function_is_found_by_running(ids):
    import transformers

    from evals.architectures.tiny_models import inputs
    from evals.architectures.tiny_models import tiny as build

    model = build(transformers.Lfm2ForCausalLM, "lfm2")
    given = inputs(model, 2, 16)
    with torch.no_grad():
        found = verify_all(model, survey(model).blocks, lambda: model(**given))
    assert [block.activation for block in found] == ["silu"] * len(found)


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
