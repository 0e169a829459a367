"""Output directions by name, and what they mean in tokens."""

import pytest
import torch
import transformers
from torch import nn

import surgery
from surgery.errors import RecipeError
from surgery.models import loading
from surgery.reading.block_in_model import find_block, surroundings
from surgery.reading.directions import NormScale, Vocabulary, named_direction
from surgery.reading.explanation import ExplainSettings, explained
from tests.reading.support import TEXT


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("kind", ["layer", "rms", "gemma"])
def test_a_direction_behind_a_norm_is_read_off_the_stream_before_it(kind, width):
    torch.manual_seed(0)
    norm = {
        "layer": lambda: nn.LayerNorm(width),
        "rms": lambda: transformers.models.llama.modeling_llama.LlamaRMSNorm(width),
        "gemma": lambda: transformers.models.gemma.modeling_gemma.GemmaRMSNorm(width),
    }[kind]()
    for parameter in norm.parameters():
        parameter.data.normal_()
    r, e = torch.randn(5, width), torch.randn(width)
    behind = (norm(r) - norm(torch.zeros(1, width))) @ e
    scale = r.std(-1, unbiased=False) if kind == "layer" else r.square().mean(-1).sqrt()
    before = r.double() @ NormScale.of(norm, width).before(e.double())
    torch.testing.assert_close(before, (behind * scale).double(), rtol=2e-4, atol=2e-4)


def test_a_tokens_direction_is_the_derivative_of_its_logit(folders):
    """d(logit − mean logit)/d(what the last block writes), up to the final norm's own scale (and its share along r)."""
    loaded = loading.loaded(folders["twin"])
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.arange(3, 11)[None]
    place = surroundings(model, find_block(model, 1), {"input_ids": ids})
    w = named_direction("token:fox", model, tokenizer, place, place.polynomial.expand()).vector
    stream = {}
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: stream.update(r=args[0][0, -1]))
    with torch.no_grad():
        model(ids)
    handle.remove()

    def logit(r):
        logits = model.lm_head(model.model.norm(r[None]))[0]
        return logits[tokenizer.convert_tokens_to_ids("fox")] - logits.mean()

    r = stream["r"]
    gradient = torch.autograd.functional.jacobian(logit, r).double()
    across = w - r.double() * (w @ r.double()) / r.double().square().sum()  # a norm does not see growth along r
    torch.testing.assert_close(gradient * r.square().mean().sqrt(), across, rtol=1e-3, atol=1e-4)


def test_vocabulary_ends_are_ordered(folders):
    loaded = loading.loaded(folders["twin"])
    model = loaded.model
    place = surroundings(model, find_block(model, 1), {"input_ids": torch.arange(3, 11)[None]})
    words = Vocabulary.of(model, loaded.tokenizer, place)
    covector = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = words.inputs(covector, 3)
    score = model.model.layers[1].post_attention_layernorm(model.model.embed_tokens.weight).detach().double() @ covector
    assert [row["token"] for row in ends["positive"]] == [loaded.tokenizer.decode([i]) for i in score.topk(3).indices]
    assert ends["negative"][0]["score"] < 0 < ends["positive"][0]["score"]
    assert all(abs(row["score"]) <= 1 for end in words.predictions(covector, 5).values() for row in end)


def test_directions_from_files_and_of_neurons(folders, tmp_path):
    torch.save(torch.arange(32.0), tmp_path / "w.pt")
    found = explained(ExplainSettings(folders["twin"], 1, f"file:{tmp_path / 'w.pt'}", **TEXT))
    assert found["direction"]["norm"] == pytest.approx(float(torch.arange(32.0).norm()))
    torch.save(torch.arange(31.0), tmp_path / "v.pt")
    with pytest.raises(RecipeError, match="writes 32 coordinates"):
        explained(ExplainSettings(folders["twin"], 1, f"file:{tmp_path / 'v.pt'}", **TEXT))
    found = explained(ExplainSettings(folders["twin"], 0, "neuron:1.3", **TEXT))
    model = surgery.load(folders["twin"])
    layer = model.model.layers[1]
    expected = layer.post_attention_layernorm.weight * layer.mlp.gate_proj.weight[3]
    assert found["direction"]["norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
