"""What was found is believed once it was recomputed."""

import pytest
import torch

from surgery.blocks.find import survey
from surgery.blocks.verify import verify_all
from surgery.errors import ModelError
from tests import tiny
from tests.blocks.support import run


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


def test_a_block_that_is_not_what_it_seems_is_left_alone_and_told(ids):
    import surgery

    model = tiny.make("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj((mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).clamp(-0.1, 0.1))
    twin, report = surgery.convert(model, text=ids, window=24)
    assert [row["path"] for row in report.blocks] == ["model.layers.0.mlp"]
    assert report.form == "custom"
    ((path, reason),) = report.left_alone
    assert path == "model.layers.1.mlp"
    assert "something else happens inside it" in reason
    with pytest.raises(ModelError, match=r"layers\.1\.mlp"):
        surgery.convert(twin, text=ids, window=24, blocks="0")


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
