"""GGUF files of stock models."""

import os
from contextlib import nullcontext

import pytest
import torch

from surgery.models import loading
from surgery.models.gguf_files import gguf_read_once
from tests import tiny

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    """A tiny Llama's."""
    model = tiny.make("llama")
    config, state = model.config, model.state_dict()
    place = tmp_path / "tiny.gguf"
    out = gguf.GGUFWriter(place, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("llama")
    out.add_token_list([f"word{number}" for number in range(config.vocab_size)])
    out.add_token_scores([-float(number) for number in range(config.vocab_size)])
    out.add_token_types([1] * config.vocab_size)
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{short}": f"model.layers.{layer}.{name}" for name, short in NAMES.items()}
    for short, name in tensors.items():
        out.add_tensor(f"{short}.weight", state[f"{name}.weight"].numpy().copy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return place


def test_a_file_is_read_once_and_gives_what_it_gave(file, monkeypatch):
    read, plain = [], gguf.GGUFReader

    def reader(path, *more):
        read.append(path)
        return plain(path, *more)

    monkeypatch.setattr(gguf, "GGUFReader", reader)
    known = gguf.get_tensor_name_map
    once = loading.loaded(str(file)).model
    assert len(read) == 1
    assert gguf.GGUFReader is reader and gguf.get_tensor_name_map is known
    monkeypatch.setattr(loading, "gguf_read_once", nullcontext)
    often = loading.loaded(str(file)).model
    assert len(read) > 3, "the control: as transformers reads it"
    assert all(torch.equal(value, often.state_dict()[name]) for name, value in once.state_dict().items())
    assert torch.equal(
        once.model.layers[0].mlp.gate_proj.weight, tiny.make("llama").model.layers[0].mlp.gate_proj.weight
    )


def test_a_file_that_has_changed_is_read_again(file):
    before = loading.loaded(str(file)).model.get_input_embeddings().weight
    content = bytearray(file.read_bytes())
    tensor = next(one for one in gguf.GGUFReader(file).tensors if one.name == "token_embd.weight")
    content[tensor.data_offset : tensor.data_offset + 4] = b"\0\0\0\0"
    file.write_bytes(content)
    after = loading.loaded(str(file)).model.get_input_embeddings().weight
    assert before[0, 0] != 0 and after[0, 0] == 0


def test_one_inside_another_leaves_all_as_it_was(monkeypatch):
    plain = gguf.GGUFReader
    with gguf_read_once(), gguf_read_once():
        assert gguf.GGUFReader is not plain
    assert gguf.GGUFReader is plain
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    with gguf_read_once():
        assert gguf.GGUFReader is plain


def test_a_configuration_is_parsed_again_when_its_file_has_changed(file, monkeypatch):
    read, plain = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda *given: read.append(given) or plain(*given))
    loading.load_config(str(file)).num_hidden_layers = 0
    assert loading.load_config(str(file)).num_hidden_layers == tiny.make("llama").config.num_hidden_layers
    assert len(read) == 1, "and what one asker does to it is its own affair"
    os.utime(file, ns=(1, 1))
    loading.load_config(str(file))
    assert len(read) == 2
