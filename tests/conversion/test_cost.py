"""What a conversion takes, counted from shapes, against what torch counts while it runs."""

import json

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import surgery
from surgery.blocks.find import survey
from surgery.conversion.cost import ConversionCost
from surgery.conversion.inspection import plan_conversion
from surgery.conversion.recipe import Recipe
from surgery.runs.estimate import sized
from surgery.runtime.speed import Speed
from tests import tiny

IDS = torch.randint(3, 96, (256, 32), generator=torch.Generator().manual_seed(3))


def counted(name: str, tokens: int = IDS.numel(), **settings) -> ConversionCost:
    model = tiny.make(name)
    settings = {"model": "unnamed", "text": "python", "tokens": tokens, "measure": 0} | settings
    return ConversionCost.of(model, survey(model).blocks, Recipe(**settings))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"degree": 2, "epochs": 0}),
        ("llama", {"degree": 2, "epochs": 3}),
        ("llama", {"degree": 3}),
        ("llama", {"degree": 1}),
        ("llama", {"degree": 2, "epochs": 0, "target": "block"}),
        ("gpt2", {"degree": 2, "epochs": 2}),
    ],
)
def test_operations_are_those_that_torch_counts(name, settings):
    """But for attention's scores, which hang on the window, and solutions in float64, which torch does not count."""
    cost = counted(name, **settings)
    with FlopCounterMode(display=False) as counter:
        surgery.convert(tiny.make(name), text=IDS, window=32, measure=0, matmul="float32", **settings)
    ratio = (cost.products + cost.exact) / counter.get_total_flops()
    print(f"{name} {settings}: {ratio:.2f}")
    assert 0.75 < ratio < 1.25


def test_what_grows_with_what():
    one, two = (counted("llama", tokens=tokens, epochs=0) for tokens in (2**20, 2**21))
    assert two.products == 2 * one.products
    assert two.double == one.double
    assert 1.5 < two.memory / one.memory <= 2
    assert counted("llama", epochs=6).products > 2 * counted("llama", epochs=0).products
    speeds = [Speed(fast, 1e9, 1e9) for fast in (1e9, 4e9)]
    assert one.seconds(speeds[0]) - one.seconds(speeds[1]) == pytest.approx(0.75 * one.products / 1e9)


def test_tokens_go_to_few_of_many_experts():
    """Each token passes the experts chosen for it, and every expert is solved for."""

    def cost(chosen):
        config = transformers.MixtralConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=chosen,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.MixtralForCausalLM(config)
        plan = Recipe(model="unnamed", text="python", tokens=8192, measure=0, epochs=0)
        return ConversionCost.of(model, survey(model).blocks, plan)

    two, four = cost(2), cost(4)
    assert two.double == four.double
    assert two.exact < four.exact < 2 * two.exact
    assert two.products < four.products < 2 * two.products


def test_a_plan_says_what_it_takes(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "model")
    recipe = Recipe(model=str(tmp_path / "model"), text="python", degree=3)
    planned = plan_conversion(recipe)
    cost = planned["cost"]
    assert cost["seconds"] > 0
    weights = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert weights * 0.9 < cost["disk"] < weights * 1.1, sized(cost["disk"])
    assert json.loads(json.dumps(planned))["cost"] == cost
