"""A model that the caller holds: taken out of what wraps it, or refused with what to do."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.errors import ModelError
from surgery.models import quantised

MERGE = "merge it first: model = model.merge_and_unload()"


def unwrapped(model: Any) -> Any:
    """The transformers model inside compilation and data parallelism.

    `model.compile()` is undone on the way: what was compiled would not be the twin.

    Raises:
        ModelError: no transformers model; adapters on it, quantised, or with weights that are not in memory.
    """
    if isinstance(model, nn.Module):
        from accelerate.utils import extract_model_from_parallel

        model = extract_model_from_parallel(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    name = type(model).__name__
    if hasattr(model, "merge_and_unload") or hasattr(model, "peft_config") or _has_adapters(model):
        raise ModelError("the model has adapters on it", where=name, cause="a LoRA or another of peft's", fix=MERGE)
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "model_type"):
        raise ModelError(
            f"{name} is not a transformers model",
            cause="a model of your own, or only a part of one" if isinstance(model, nn.Module) else "",
            fix="give a Hub id, a folder, a .gguf file, or what transformers' from_pretrained returned",
        )
    quantised.check_whole(model, name)
    elsewhere = next((path for path, value in model.named_parameters() if value.is_meta), None)
    offloaded = any(getattr(getattr(part, "_hf_hook", None), "offload", False) for part in model.modules())
    if elsewhere is not None or offloaded:
        raise ModelError(
            "some of the model's weights are not in memory" + (f", first {elsewhere}" if elsewhere else ""),
            where=name,
            cause="it was loaded with a device_map that leaves them on disk or on the CPU",
            fix="load it without device_map; or convert it by name with offload=True, which leaves weights on disk",
        )
    for part in model.modules():
        if getattr(part, "_compiled_call_impl", None) is not None:
            part._compiled_call_impl = None
    return model


def _has_adapters(model: Any) -> bool:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return False
    return isinstance(model, nn.Module) and any(isinstance(part, BaseTunerLayer) for part in model.modules())
