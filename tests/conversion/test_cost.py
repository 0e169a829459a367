"""What a conversion takes, counted from shapes, against what torch counts while it runs."""

import json
from functools import partial

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import surgery
from surgery.blocks.find import survey
from surgery.conversion import cost as cost_module
from surgery.conversion.cost import ConversionCost
from surgery.conversion.inspection import plan_conversion
from surgery.conversion.recipe import Recipe
from surgery.fitting import either
from surgery.fitting.block import FitSettings
from surgery.runs.estimate import sized
from surgery.runtime.speed import Speed
from tests import tiny

IDS = torch.randint(3, 96, (256, 32), generator=torch.Generator().manual_seed(3))


def mixtral(chosen: int = 2):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=chosen,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def counted(model, tokens: int = IDS.numel(), **settings) -> ConversionCost:
    settings = {"model": "unnamed", "text": "python", "tokens": tokens, "measure": 0} | settings
    return ConversionCost.of(model, survey(model).blocks, Recipe(**settings))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"degree": 2}),
        ("llama", {"degree": 2, "epochs": 0}),
        ("llama", {"degree": 3}),
        ("llama", {"degree": 1}),
        ("llama", {"degree": 2, "epochs": 0, "target": "block"}),
        ("llama", {"degree": 2, "readout": "keep"}),
        ("opt", {"degree": 2, "epochs": 2}),  # a block without a module of its own: passes wait inside it
        ("gpt2", {"degree": 2, "epochs": 2}),
        ("mixtral", {"degree": 2, "epochs": 0}),
        ("mixtral", {"degree": 2, "epochs": 2}),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_operations_are_those_that_torch_counts(name, settings, kept, monkeypatch):
    """But for attention's scores, which hang on the window, and the solution of triangular systems."""
    monkeypatch.setattr(FitSettings, "unit_tokens", 512)  # else a tiny model's are all that calibration has
    for module in (cost_module, either):
        monkeypatch.setattr(module, "CACHE_BYTES", 1 << 30 if kept else 0)
    make = mixtral if name == "mixtral" else partial(tiny.make, name)
    cost = counted(make(), **settings)
    with FlopCounterMode(display=False) as counter:
        surgery.convert(make(), text=IDS, window=32, measure=0, matmul="float32", **settings)
    ratio = (cost.products + cost.exact) / counter.get_total_flops()
    print(f"{name} {settings} {kept}: {ratio:.2f}")
    assert 0.9 < ratio < (1.03 if name == "llama" else 1.2)


def test_what_grows_with_what():
    one, two = (counted(tiny.make("llama"), tokens=tokens, epochs=0) for tokens in (2**20, 2**21))
    assert two.exact == 2 * one.exact
    assert 1.99 * one.products < two.products < 2 * one.products, (
        "units are solved on so many tokens, whatever there is"
    )
    assert two.double == one.double
    assert 1.5 < two.memory / one.memory <= 2
    assert counted(tiny.make("llama"), epochs=6).products > 2 * counted(tiny.make("llama"), epochs=0).products
    speeds = [Speed(fast, 1e9, 1e9) for fast in (1e9, 4e9)]
    assert one.seconds(speeds[0]) - one.seconds(speeds[1]) == pytest.approx(0.75 * one.products / 1e9)


def test_tokens_go_to_few_of_many_experts():
    """Each token passes the experts chosen for it, and every expert is solved for."""

    two, four = (counted(mixtral(chosen), epochs=0) for chosen in (2, 4))
    assert two.double == four.double
    assert four.exact == pytest.approx(2 * two.exact, rel=1e-3)
    assert two.products < four.products < 2 * two.products


def test_units_are_solved_on_some_tokens_per_input_and_experts_on_no_more_than_they_see(monkeypatch):
    def products(model, tokens):
        monkeypatch.setattr(FitSettings, "unit_tokens", tokens)
        return counted(model, epochs=0).products

    llama = tiny.make("llama")
    assert products(llama, 1) == products(llama, 4 * tiny.WIDTH) < products(llama, 8 * tiny.WIDTH)
    share = IDS.numel() * 2 // 4  # two of four experts a token
    assert products(mixtral(), share // 2) < products(mixtral(), share) == products(mixtral(), 2 * share)


def test_smaller_twins_take_less_disk_and_offloading_less_memory():
    model = tiny.make("llama")
    whole, affine, half = (counted(model, **how).disk for how in ({}, {"degree": 1}, {"units": 0.5}))
    assert affine < half < whole
    twin, _ = surgery.convert(model, text=IDS, window=32, degree=1)
    found = sum(4 * value.numel() for value in twin.parameters())
    assert affine == pytest.approx(found, rel=0.02)
    resident, offloaded = (counted(tiny.make("llama"), offload=on, output="x").memory for on in (False, True))
    assert offloaded < 0.8 * resident


def test_models_without_embeddings_are_counted_too():
    config = transformers.Wav2Vec2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    assert counted(transformers.Wav2Vec2ForSequenceClassification(config)).products > 0


def test_a_plan_says_what_it_takes(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "model")
    recipe = Recipe(model=str(tmp_path / "model"), text="python", degree=3)
    planned = plan_conversion(recipe)
    cost = planned["cost"]
    assert cost["seconds"] > 0
    weights = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert weights * 0.9 < cost["disk"] < weights * 1.1, sized(cost["disk"])
    assert json.loads(json.dumps(planned))["cost"] == cost
