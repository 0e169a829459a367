"""What the tests of blocks share."""

import transformers as T

from evals.architectures.tiny_models import inputs, tiny
from surgery.blocks.find import survey

SHAPES = {
    "mixtral": T.MixtralForCausalLM,  # [gate; up]
    "gpt_oss": T.GptOssForCausalLM,  # gate and up interleaved, transposed, biases, clamps, (up + 1)
    "nemotron_h": T.NemotronHForCausalLM,  # no gate
    "deepseek_v3": T.DeepseekV3ForCausalLM,  # shared experts, routing weights that do not add up to one
    "deepseek_v4": T.DeepseekV4ForCausalLM,  # clamped gate
    "dbrx": T.DbrxForCausalLM,  # all experts' rows in one matrix
    "llama4": T.Llama4ForCausalLM,  # weighs the inputs and repeats them for each expert
    "longcat_flash": T.LongcatFlashForCausalLM,  # some experts give back what they are given
}


LISTED = {
    "switch_transformers": T.SwitchTransformersForConditionalGeneration,  # numbers are one-hot
    "nllb-moe": T.NllbMoeForConditionalGeneration,  # biases, outputs scaled when it does not train
}


IDS = inputs(tiny(T.LlamaForCausalLM, "llama"), 64, 24)["input_ids"]


def model_of(name: str, **changes):
    model = tiny(SHAPES[name], name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    return model


def the_experts(model):
    return [block for block in survey(model).blocks if block.kind == "experts"]
