"""Mixtures of experts: every expert is a block of its own for the tokens routed to it."""

import pytest
import torch

import surgery
from evals.architectures.tiny_models import tiny
from surgery.blocks import experts
from surgery.blocks.find import survey
from surgery.blocks.verify import verify_all, verify_each
from surgery.errors import ModelError
from tests.blocks.of_experts import IDS, LISTED, SHAPES, model_of, the_experts


@pytest.mark.parametrize("name", SHAPES)
def test_the_module_is_recomputed_from_the_weights_found(name):
    model = model_of(name)
    blocks = the_experts(model)
    assert blocks and all(block.experts == 4 for block in blocks)
    with torch.no_grad():
        assert len(verify_all(model, blocks, lambda: model(IDS[:2]))) == len(blocks)


def test_a_wrong_layout_is_refused():
    model = model_of("mixtral")
    model.get_submodule(the_experts(model)[0].path).is_concatenated = False
    with torch.no_grad(), pytest.raises(ModelError, match="does not give what the model computes"):
        verify_all(model, the_experts(model), lambda: model(IDS[:2]))


class Square(torch.nn.Module):
    def forward(self, x):
        return x * x


@pytest.mark.parametrize("name", LISTED)
def test_a_module_for_each_expert(name):
    """Found, recomputed and, where their units are squares, recovered exactly."""
    model = tiny(LISTED[name], name, causal=False)
    blocks = survey(model).blocks
    listed = the_experts(model)
    assert [block.experts for block in listed] == [4, 4]
    for block in blocks:
        module = model.get_submodule(block.path)
        for part in module.values() if block.kind == "experts" else [module]:
            part.act = Square()
    given = {"input_ids": IDS, "decoder_input_ids": IDS.roll(1, 1)}
    with torch.no_grad():
        before = model(**given).logits
    twin, report = surgery.convert(model, text=given, degree=2, window=24, matmul="float32")
    with torch.no_grad():
        after = twin(**given).logits
    rows = [row for row in report.blocks if row["kind"] == "experts"]
    assert len(rows) == 2
    assert (after - before).norm() < 1e-3 * before.norm()


def test_a_gate_of_its_own_without_flags():
    """Step 3.7 clamps gate and up, and does not say how its weights are kept."""
    from types import SimpleNamespace

    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    sizes = SimpleNamespace(num_local_experts=4, hidden_size=32, moe_intermediate_size=48, hidden_act="silu")
    module = Step3p7Experts(sizes, swiglu_limit=0.5)
    generator = torch.Generator().manual_seed(0)
    x, index = torch.randn(20, 32, generator=generator), torch.randint(4, (20, 1), generator=generator)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
        assert experts.why_not(module) is None
        found = experts.recomputed(module, x, experts.Routing(index, torch.ones(20, 1)))
        assert torch.allclose(found, module(x, index, torch.ones(20, 1)), atol=1e-5)


def test_a_module_for_each_expert_in_half_precision():
    model = tiny(LISTED["nllb-moe"], "nllb-moe", causal=False).bfloat16()
    given = {"input_ids": IDS[:4], "decoder_input_ids": IDS[:4].roll(1, 1)}
    with torch.no_grad():
        good, bad = verify_each(model, the_experts(model), lambda: model(**given))
    assert len(good) == 2 and not bad


def test_routing_by_one_hot_numbers_and_by_repeated_inputs():
    module = model_of("mixtral").model.layers[0].mlp.experts
    x, weight = torch.rand(3, 32), torch.rand(3, 1)
    one_hot = torch.tensor([[[0, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]])
    assert experts.Routing.of(module, (x, one_hot, weight), {}).index.tolist() == [[1], [4], [0]]
    module = next(layer.feed_forward.experts for layer in model_of("llama4").model.layers if layer.is_moe_layer)
    repeated = torch.zeros(4, 3, 32)
    repeated[2, 0], repeated[0, 1] = x[0], x[1]
    found = experts.Routing.of(module, (repeated.view(12, 32),), {})
    assert found.index.tolist() == [[2], [0], [4]]
    with torch.no_grad():
        once = experts.folded(module, module(repeated.view(12, 32)))
        assert torch.allclose(experts.recomputed(module, x, found), once, atol=1e-6)
    repeated[1, 0] = x[0]
    with pytest.raises(ModelError, match="cannot be told apart"):
        experts.Routing.of(module, (repeated.view(12, 32),), {})


def test_routing_finds_its_arguments_in_either_order():
    module = model_of("mixtral").model.layers[0].mlp.experts
    x, index, weight = torch.zeros(3, 32), torch.tensor([[0], [1], [0]]), torch.rand(3, 1)
    found = experts.Routing.of(module, (x, index, weight), {})
    assert torch.equal(found.index, index)
    by_name = experts.Routing.of(module, (x,), {"top_k_weights": weight, "top_k_index": index})
    assert torch.equal(by_name.index, index)
    assert torch.equal(by_name.of_expert(0)[0], torch.tensor([0, 2]))
    with torch.no_grad():
        assert torch.allclose(experts.recomputed(module, x, found), module(x, index, weight))
