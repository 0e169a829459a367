"""A tiny random model of any transformers model type, without network.

A type's default configuration is shrunk by the names of its sizes; what the names do not decide stands in `TYPES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

LARGEST = 100_000_000  # parameters; more means that a size was not recognised by its name


def _named(sizes: Mapping[int, str]) -> dict[str, int]:
    return {name: size for size, names in sizes.items() for name in names.split()}


SIZES = _named({
    0: "num_kv_shared_layers",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num "
       "first_k_dense_replace num_dense_layers o_groups",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers num_blocks "
       "num_encoder_layers conf_num_hidden_layers num_layers_per_stack speech_encoder_layers t2u_encoder_layers "
       "t2u_decoder_layers num_self_attends_per_block num_key_value_heads swa_num_key_value_heads num_query_groups "
       "linear_num_key_heads linear_num_value_heads num_experts_per_tok moe_topk moe_k num_experts_per_token "
       "top_k_experts moe_top_k",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
       "num_encoder_attention_heads num_decoder_attention_heads index_n_heads swa_num_attention_heads num_kv_heads "
       "conf_num_attention_heads linear_num_heads num_experts n_routed_experts num_local_experts moe_num_experts",
    8: "head_dim qk_rope_head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim d_kv d_head "
       "linear_head_dim index_head_dim swa_head_dim rotary_dim kv_channels global_head_dim dim_head patch_size "
       "attention_head_size attention_head_dim mamba_n_heads query_pre_attn_scalar",
    16: "kv_lora_rank q_lora_rank qk_head_dim o_lora_rank laurel_rank hidden_size_per_layer_input d_rel mamba_d_head "
        "mamba_dt_rank mamba_d_state state_size ssm_state_size pronunciation_embed_dim shape_embed_dim adapter_rank",
    32: "hidden_size d_model n_embd emb_dim dim embedding_size word_embed_proj_dim hidden_size_global embedding_dim "
        "backbone_hidden_size projection_dim lru_width output_dim cross_attention_hidden_size attention_hidden_size "
        "input_embedding_size output_embedding_size true_hidden_size image_size crop_size",
    48: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size",
    64: "intermediate_size encoder_ffn_dim decoder_ffn_dim d_ff ffn_dim dim_ff dff d_inner ffn_hidden_size n_inner "
        "intermediate_size_mlp dense_intermediate_size feed_forward_size mlp_dim shared_intermediate_size",
    128: "vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input audio_vocab_size "
         "entity_vocab_size unpadded_vocab_size pronunciation_vocab_size shape_vocab_size t2u_vocab_size vocab_offset "
         "encoder_hash_byte_group_vocab unit_hifi_gan_vocab_size char_vocab_size ngram_vocab_size_base sliding_window "
         "original_max_position_embeddings sliding_window_size attention_window_size",
    256: "max_position_embeddings n_positions max_seq_len n_ctx max_source_positions max_target_positions "
         "context_length model_max_length max_encoder_position_embeddings max_decoder_position_embeddings",
})  # fmt: skip

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
          "cls_token_id": 3, "sep_token_id": 3}  # fmt: skip

_FOUR = {"num_hidden_layers": 4}  # the shortest stack with every kind of layer
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
            "indexer_compress_ratio": 4}  # fmt: skip
_HEADS = {"num_key_value_heads": 4}
_SWIN = {"image_size": 64, "patch_size": 4, "window_size": 4, "depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16}
_ZAMBA = {**_FOUR, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
          "attention_head_dim": 16}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_hidden_layers": 6},
    "bamba": {"mamba_n_heads": 4, "attn_layer_indices": [1]},
    "blt": {"use_cache": False},  # transformers' cache asks its configuration for a number of layers that it has not
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": _SWIN,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": _HEADS,
    "dots3_note_text": _HEADS,
    "esm": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 4},
    "esmc": {"vocab_size": 128, **_HEADS},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": [64, 64]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": [2, 2], "num_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "led": {"attention_window": 4},
    "levit": {"image_size": 64, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": _FOUR,
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "mobilebert": {"hidden_size": 32, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "mobilevitv2": {"image_size": 64},
    "musicgen": {"num_codebooks": 2},
    "musicgen_melody": {"num_codebooks": 2},
    "nemotron": {"head_dim": 8, **_HEADS},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "neomme": {"head_dim": 16},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
    "qwen3_5": _FOUR,
    "qwen3_5_moe": _FOUR,
    "qwen3_5_moe_text": _FOUR,
    "qwen3_5_text": _FOUR,
    "qwen3_next": _FOUR,
    "qwen4_exp": {**_FOUR, **_INDEXER},
    "qwen4_exp_text": {**_FOUR, **_INDEXER},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "local"]},
    "swin": _SWIN,
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "ultrabert": {"prediction_head_size": 32},
    "ultravbert": {"prediction_head_size": 32},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "num_mem_blocks": 1},
}
AS_DECODER = {"reformer": {"is_decoder": True}}  # causal classes that insist


def configuration(model_class: Any, model_type: str, causal: bool) -> Any:
    """The type's default configuration with small sizes. Raises whatever its class raises."""
    config_class = model_class.config_class
    base = config_class()
    values = _shrunk(base) | TYPES.get(model_type, {})
    if getattr(base, "is_encoder_decoder", False):
        values.setdefault("decoder_start_token_id", 0)
    return config_class(**values, **(AS_DECODER.get(model_type, {}) if causal else {}))


def _shrunk(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            found[key] = _shrunk(value)
        elif key in TOKENS and value is not None:
            found[key] = TOKENS[key]
        elif key in SIZES and type(value) is int and value > 0:
            found[key] = min(value, SIZES[key])
    if "kv_lora_rank" in found and "num_key_value_heads" in found:  # latent attention has no groups of heads
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def tiny(model_class: Any, model_type: str, causal: bool = True, seed: int = 0) -> Any:
    """A model of the class, weights drawn so that its blocks are far from linear.

    Raises:
        ValueError: some size was not recognised by its name.
    """
    config = configuration(model_class, model_type, causal)
    with torch.device("meta"):
        planned = model_class(config)
    size = sum(parameter.numel() for parameter in planned.parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f}M parameters: a size of this configuration has an unknown name")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:  # a table of sines, computed anew on loading
                continue
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
            elif parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def inputs(model: Any, rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random model inputs: token ids, images or sound."""
    generator = torch.Generator().manual_seed(seed)
    config, name = model.config, model.main_input_name

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        if "num_patches" in vars(vision):  # images come cut into patches (SigLIP 2)
            side = int(vision.num_patches**0.5)
            return {name: noise(side**2, vision.num_channels * vision.patch_size**2),
                    "pixel_attention_mask": torch.ones(rows, side**2, dtype=torch.long),
                    "spatial_shapes": torch.full((rows, 2), side)}  # fmt: skip
        size = getattr(vision, "image_size", None) or 64
        height, wide = size if isinstance(size, list | tuple) else (size, size)
        return {name: noise(getattr(vision, "num_channels", 3), height, wide)}
    if name == "input_values":
        if hasattr(config, "max_length"):  # a spectrogram (AST)
            return {name: noise(config.max_length, config.num_mel_bins)}
        return {name: noise(1600)}
    if name == "input_features":
        return {name: noise(*_spectrogram(config))}
    ids = torch.randint(4, 100, (rows, length), generator=generator)
    given = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids.roll(1, 0)
    return given


def _spectrogram(config: Any) -> tuple[int, int]:
    if hasattr(config, "num_mel_bins"):  # (bins, frames), two frames a position
        return config.num_mel_bins, 2 * config.max_source_positions
    return 24, config.feature_projection_input_dim
