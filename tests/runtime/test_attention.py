"""Heads of a group that attend together."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from surgery.runtime.attention import packed_heads

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=96, num_attention_heads=6, num_key_value_heads=2, **shape)
    return LlamaForCausalLM(config).eval()


def written(model, ids, mask):
    how = {"do_sample": False, "max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(ids, attention_mask=mask, pad_token_id=0, **how)
    return found.sequences, torch.stack(found.logits)


def test_the_same_text_by_fewer_reads_of_keys_and_values(model, monkeypatch):
    ids = torch.randint(1, 96, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    plain, logits = written(model, ids, mask)
    shapes, kernel = set(), torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, value, **how):
        shapes.add((query.shape[1], query.shape[2], how.get("enable_gqa", False)))
        return kernel(query, key, value, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    with packed_heads(CPU):
        sequences, found = written(model, ids, mask)
    assert torch.equal(sequences, plain)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert (2, 3, False) in shapes and not any(queries == 1 for _, queries, _ in shapes)
    written(model, ids, mask)
    assert (6, 1, True) in shapes, "the control: afterwards, and without it, each head reads by itself"


@pytest.mark.parametrize("named", [False, True])
def test_masks_are_passed_on_by_place_and_by_name(named):
    query, key = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 5, 8)
    mask = torch.arange(5)[None, None, None] < torch.tensor([3, 5])[:, None, None, None]
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    wanted, _ = sdpa_attention_forward(module, query, key, key, mask)
    free, _ = sdpa_attention_forward(module, query, key, key, None)
    with packed_heads(CPU):
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        assert attend is not sdpa_attention_forward
        found, _ = (
            attend(module, query, key, key, **{"attention_mask": mask})
            if named
            else attend(module, query, key, key, mask)
        )
        without, _ = attend(module, query, key, key, attention_mask=None)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(without, free)
    assert (wanted - free).abs().max() > 0.01


def test_what_stands_in_the_place_of_attention_stays_there():
    def other(*given, **named):
        return sdpa_attention_forward(*given, **named)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = other
    try:
        with packed_heads(CPU):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    with packed_heads(CPU), packed_heads(CPU):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    with packed_heads(torch.device("meta")):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
