"""Heads of a group that attend together."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
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


@pytest.mark.parametrize("padded", [False, True])
def test_the_same_text_by_fewer_reads_of_keys_and_values(model, padded, monkeypatch):
    ids = torch.randint(1, 96, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:2, :3] = 1 - int(padded)
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
    assert padded or (6, 1, True) in shapes, "the control: afterwards, and without it, each head reads by itself"


def test_what_others_put_in_place_of_attention_is_used_and_put_back():
    calls = []

    def other(*given, **more):
        calls.append(given[1].shape)
        return ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"](*given, **more)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = other
    try:
        with packed_heads(CPU):
            query, key = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 5, 8)
            ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Module(), query, key, key, None)
        assert calls == [(2, 2, 3, 8)]
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    with packed_heads(CPU):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"]
    with packed_heads(torch.device("meta")):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"]
