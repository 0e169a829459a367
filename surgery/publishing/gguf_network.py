"""A Llama's settings and weights by the names that GGUF has for them.

llama.cpp rotates neighbours (x₂ᵢ, x₂ᵢ₊₁) of a query or key where transformers rotates halves (xᵢ, xᵢ₊d/2), so the rows
that make them are reordered. Rotary angles that are scaled (Llama 3, YaRN, linear) are written as what each frequency
is divided by; a factor on queries and keys goes into the map that makes queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from surgery.errors import ModelError

ARCHITECTURE = "llama"
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # the others change with the length of the text


def settings(model: Any) -> dict[str, int | float]:
    """By GGUF's names, without the architecture's in front of them.

    Raises:
        ModelError: not a `LlamaForCausalLM`, an activation other than SiLU, or angles that change with the text.
    """
    config = model.config
    if type(model).__name__ != "LlamaForCausalLM" or config.hidden_act != "silu":
        raise ModelError(
            "llama.cpp's Llama is not this network",
            where=type(model).__name__,
            cause=f"its activation is {config.hidden_act}" if type(model).__name__ == "LlamaForCausalLM" else "",
            fix="export a native twin of a Llama-like model",
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in FIXED_ANGLES:
        raise ModelError(
            f"rotary angles of kind {kind!r} depend on the length of the text",
            where=type(model).__name__,
            fix=f"export a model with one of {', '.join(FIXED_ANGLES)}",
        )
    head = config.head_dim
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }


def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by GGUF's name, one after another, float32 on the CPU; tied ones once."""
    config, angles = model.config, model.model.rotary_emb
    tied = config.tie_word_embeddings
    divisors = _divisors(config, angles)
    if divisors is not None:
        yield "rope_freqs.weight", divisors
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, stored in model.state_dict().items():
        holder, _, kind = name.rpartition(".")
        if tied and holder == "lm_head":
            continue
        value, part = stored.detach().float().cpu(), holder.rpartition(".")[2]
        scale = angles.attention_scaling**2 if part == "q_proj" else 1.0
        turned = _neighbours(value * scale, heads[part]) if part in heads else value
        yield f"{_renamed(holder)}.{kind}", turned


def _renamed(holder: str) -> str:
    if holder in OUTSIDE:
        return OUTSIDE[holder]
    number, _, part = holder.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{INSIDE[part]}"


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query's or a key's map, (heads · d, …): of each head those of xᵢ and xᵢ₊d/2 beside each other."""
    halves = rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _divisors(config: Any, angles: Any) -> Tensor | None:
    """What each frequency is divided by, (d/2,); None where all are divided by 1."""
    base, size = config.rope_parameters["rope_theta"], config.head_dim
    plain = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    divisors = plain / angles.inv_freq.double().cpu()
    return None if torch.allclose(divisors, torch.ones_like(divisors), rtol=1e-5) else divisors.float()
