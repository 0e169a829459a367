"""A block in its model: what it computes, and the norms around it."""

import pytest
import torch

import surgery
from surgery.reading.block_in_model import find_block, recorded_activity, surroundings
from tests import tiny


def twin_of(name, ids, degree=2):
    return surgery.convert(tiny.make(name), text=tiny.inputs_for(name, ids), degree=degree, batch=16)[0]


@pytest.mark.parametrize(
    ("name", "degree"),
    [("llama", 2), ("qwen3", 3), ("gpt2", 3), ("opt", 2), ("phi3", 2), ("bert", 2), ("gpt2", 1), ("phi", 2)],
)
def test_the_polynomial_read_is_the_block_that_runs(name, degree, ids):
    model = twin_of(name, ids, degree)
    place = find_block(model, 1)
    recorded = recorded_activity(model, place, [{"input_ids": ids[:4]}])
    assert place.polynomial.degree == degree
    torch.testing.assert_close(place.polynomial(recorded.x.double()).float(), recorded.y, rtol=1e-4, atol=1e-5)


def test_stopping_at_the_block_changes_nothing_it_sees(ids):
    model = twin_of("llama", ids)
    place, seen = find_block(model, 0), []
    handle = place.entry.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids[:4])
    handle.remove()
    recorded = recorded_activity(model, place, [{"input_ids": ids[:2]}, {"input_ids": ids[2:4]}])
    torch.testing.assert_close(recorded.x, seen[0])


@pytest.mark.parametrize(
    ("name", "norm", "final", "after"),
    [
        ("llama", "model.layers.1.post_attention_layernorm", "model.norm", False),
        ("gemma2", "model.layers.1.pre_feedforward_layernorm", "model.norm", True),
        ("gpt2", "transformer.h.1.ln_2", "transformer.ln_f", False),
        ("opt", "model.decoder.layers.1.final_layer_norm", "model.decoder.final_layer_norm", False),
        ("bert", "bert.encoder.layer.1.attention.output.LayerNorm", "cls.predictions.transform.LayerNorm", False),
    ],
)
def test_norms_are_found_by_what_they_write(name, norm, final, after, ids):
    model = twin_of(name, ids)
    place = surroundings(model, find_block(model, 1), {"input_ids": ids[:1]})
    assert place.norm is model.get_submodule(norm)
    assert place.final_norm is model.get_submodule(final)
    assert place.normed_after is after
