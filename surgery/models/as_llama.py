"""Models that are a Llama under another name, written as one: their twins then take the native form.

Their own classes have no `mlp_bias`, which a bilinear block needs. As a `LlamaForCausalLM` they compute the same where

    Mistral   attention sees the whole context (no sliding window, or one as long as the positions)
    Qwen2     every layer attends to everything; Llama's output map gets a bias of zero
    Gemma     norms scale by 1 + w, written into w; embeddings are multiplied by √d, written into them, so the head is
              no longer tied to them; only where weights are stored in float32, since half precision would round 1 + w

Qwen3, Gemma 2 and OLMo 2 are not: they normalise queries and keys or cap logits, and no stock class with `mlp_bias`
does. What is written is compared with the original on token ids before it is believed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

SHARED = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    max_position_embeddings initializer_range rms_norm_eps pad_token_id bos_token_id eos_token_id rope_parameters
    attention_dropout tie_word_embeddings dtype
"""
TOLERANCE, TOLERANCE_HALF = 1e-4, 2e-2
"""Relative norm of the difference in logits, computed in float32 or in half precision: Gemma's 1 + w is rounded at
another place."""


def llama_config(model: Any, stored: str) -> Any | None:
    """The configuration under which a stock Llama is this model, or None; `stored` is the precision of its twin."""
    config = model.config
    if not type(model).__name__.endswith("ForCausalLM") or not _whole_context(config):
        return None
    if not isinstance(getattr(config, "hidden_act", None), str):
        return None
    if config.model_type == "gemma" and stored not in ("float32", "float64"):
        return None
    from transformers import LlamaConfig

    values = {name: copy.deepcopy(getattr(config, name)) for name in SHARED.split() if hasattr(config, name)}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    bias = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
    values |= {"head_dim": head, "hidden_act": activation, "attention_bias": bias, "mlp_bias": False}
    if config.model_type == "gemma":
        values["tie_word_embeddings"] = False
    return LlamaConfig(**values)


def _whole_context(config: Any) -> bool:
    if config.model_type == "mistral":
        window = getattr(config, "sliding_window", None)
        return window is None or window >= config.max_position_embeddings
    if config.model_type == "qwen2":
        return set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    return config.model_type == "gemma" and not getattr(config, "use_bidirectional_attention", False)


def as_llama(model: Any, stored: str = "float32") -> Any | None:
    """The same function as a `LlamaForCausalLM` that shares the model's tensors, or None where there is none."""
    config = llama_config(model, stored)
    if config is None:
        return None
    from transformers import LlamaForCausalLM

    config._attn_implementation = model.config._attn_implementation
    state = dict(model.state_dict())
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    if model.config.model_type == "gemma":
        state = _folded(state, model.config.hidden_size)
    for name, empty in llama.state_dict().items():
        if name.endswith("o_proj.bias") and name not in state:
            state[name] = torch.zeros(empty.shape, dtype=model.dtype, device=model.device)
    if state.keys() != llama.state_dict().keys():
        return None
    llama.load_state_dict(state, assign=True)
    with torch.device(model.device):  # no state dict holds the rotary frequencies
        llama.model.rotary_emb = type(llama.model.rotary_emb)(config)
    llama.tie_weights()
    llama.generation_config = copy.deepcopy(model.generation_config)
    llama.config._name_or_path = model.config._name_or_path
    return llama.eval() if _same(model, llama) else None


def _folded(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Gemma's weights with 1 + w and √d written into them."""
    folded = {
        name: value + 1 if "norm.weight" in name or "layernorm" in name else value for name, value in state.items()
    }
    table = state["model.embed_tokens.weight"]
    folded["model.embed_tokens.weight"] = table * torch.tensor(width**0.5, dtype=table.dtype)
    return folded


def _same(model: Any, llama: Any) -> bool:
    ids = torch.arange(2 * 16, device=model.device).view(2, 16) % model.config.vocab_size
    with torch.no_grad():
        before, after = (network(input_ids=ids, use_cache=False).logits.double() for network in (model, llama))
    tolerance = TOLERANCE if model.dtype in (torch.float32, torch.float64) else TOLERANCE_HALF
    return bool((after - before).norm() <= tolerance * before.norm())
