"""Tiny random models, one per feed-forward shape. Weights are drawn so that blocks are far from linear."""

import torch
import transformers as T

WIDTH, HIDDEN, LAYERS = 32, 64, 2
COMMON = {
    "vocab_size": 96, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": HIDDEN, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 96, "d_model": WIDTH, "d_kv": 8, "d_ff": HIDDEN, "num_layers": LAYERS, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 96, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "n_inner": HIDDEN,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": 96, "hidden_size": WIDTH, "ffn_dim": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 128, "word_embed_proj_dim": WIDTH, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CPMANT = {
    "vocab_size": 96, "hidden_size": WIDTH, "num_attention_heads": 4, "dim_head": 8, "dim_ff": HIDDEN,
    "num_hidden_layers": LAYERS, "prompt_length": 2, "prompt_types": 4, "segment_types": 4,
}  # fmt: skip
VIT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": HIDDEN,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip

MAKERS = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**COMMON, num_key_value_heads=2)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=None)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**COMMON, num_key_value_heads=2)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8)),
    "gemma": lambda: T.GemmaForCausalLM(T.GemmaConfig(**COMMON, num_key_value_heads=2, head_dim=8)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=8)),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**COMMON, num_key_value_heads=2)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**COMMON)),
    "opt": lambda: T.OPTForCausalLM(T.OPTConfig(**OPT)),
    "phi": lambda: T.PhiForCausalLM(T.PhiConfig(**COMMON)),
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**COMMON)),
    "esm": lambda: T.EsmForMaskedLM(T.EsmConfig(**COMMON, mask_token_id=3)),
    "cpmant": lambda: T.CpmAntForCausalLM(T.CpmAntConfig(**CPMANT)),
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**VIT)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "t5_gated": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5, feed_forward_proj="gated-gelu")),
}
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "t5_gated", "cpmant")
KINDS = {"phi3": "fused"} | dict.fromkeys(GATED, "gated")
BLOCKS = {"t5": 2 * LAYERS, "t5_gated": 2 * LAYERS}


def make(name: str, seed: int = 0):
    """A model of a few thousand parameters; asserts its own size."""
    torch.manual_seed(seed)
    model = MAKERS[name]().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    assert sum(parameter.numel() for parameter in model.parameters()) < 120_000
    return model


def inputs_for(name: str, ids: torch.Tensor):
    """Calibration inputs."""
    if name == "vit":
        return {"pixel_values": torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(5))}
    return ids


def save_with_tokenizer(name: str, folder) -> None:
    """A tiny model as a checkpoint folder, with a tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    make(name).save_pretrained(folder)
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<pad>", "<s>", "</s>", "<unk>"])
    pieces.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog " * 4, "(){}[].,:;=_'#\"0123456789"], trainer
    )
    fast = T.PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
