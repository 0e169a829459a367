"""Llamas under another name: written as one where that is exact, and never where it is not."""

import json

import pytest
import torch
import transformers as T

import surgery
from surgery.models.as_llama import as_llama
from tests import commands, tiny


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma"])
def test_the_same_function_with_shared_tensors(name, ids):
    model = tiny.make(name).double()
    llama = as_llama(model)
    assert type(llama) is T.LlamaForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    ours = {p.data_ptr() for p in model.parameters()}
    copied = {name for name, p in llama.named_parameters() if p.data_ptr() not in ours}
    assert not any("proj.weight" in name or "lm_head" in name for name in copied)


@pytest.mark.parametrize(
    "model",
    [
        lambda: T.MistralForCausalLM(T.MistralConfig(**tiny.COMMON, num_key_value_heads=2, sliding_window=8)),
        lambda: T.Qwen2ForCausalLM(
            T.Qwen2Config(
                **tiny.COMMON, num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1
            )
        ),
        lambda: tiny.make("qwen3"),
        lambda: tiny.make("gemma2"),
        lambda: tiny.make("gpt2"),
    ],
)
def test_what_is_not_a_llama_is_left_as_it_is(model):
    assert as_llama(model().eval()) is None


def test_gemma_in_half_precision_stays_gemma(tmp_path):
    """1 + w does not survive bfloat16; and what inspect says is what convert does."""
    model = tiny.make("gemma")
    assert as_llama(model, "bfloat16") is None
    assert as_llama(model, "float32") is not None
    for stored, forms in ((torch.bfloat16, ["custom"]), (torch.float32, ["native", "custom"])):
        model.to(stored).save_pretrained(tmp_path / str(stored))
        seen = surgery.inspect(str(tmp_path / str(stored)))
        assert seen.forms(seen.survey.blocks[0]) == forms


@pytest.mark.fresh_process
@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma"])
def test_their_twins_load_with_plain_transformers(name, tmp_path):
    tiny.save_with_tokenizer(name, tmp_path / "base")
    command = ["convert", tmp_path / "base", "-o", tmp_path / "twin", "--text", "python", "--json"]
    done = commands.surgery(*command, "--tokens", 4096, "--window", 32, "--measure", 512)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["form"] == "native"
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert (config["architectures"], config["hidden_act"]) == (["LlamaForCausalLM"], "linear")
    custom = surgery.convert(tmp_path / "base", text="python", tokens=4096, window=32, measure=512, form="custom")[1]
    assert report["perplexity"]["nats"] == pytest.approx(custom.perplexity["nats"], abs=1e-3)
