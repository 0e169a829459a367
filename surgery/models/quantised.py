"""Quantised checkpoints: read with their weights made whole where transformers does that, else refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.errors import ModelError, first_line

METHOD = "quant_method"
LEFT_BEHIND = ("hf_quantizer", "quantization_method", "is_quantized")


def reading(name: str, config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which a checkpoint's weights come dequantised; none where nothing is quantised.

    Raises:
        ModelError: quantised in a way that transformers cannot undo on loading, or not without another package.
    """
    described = getattr(config, "quantization_config", None)
    if described is None:
        return {}
    described = dict(described if isinstance(described, Mapping) else described.to_dict())
    method = str(described.get(METHOD, "unknown"))
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    try:
        settings = AutoQuantizationConfig.from_dict(described)
        if not hasattr(settings, "dequantize"):
            raise _refused(name, method)
        settings.dequantize = True
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)
    except ModelError:
        raise
    except Exception as error:
        first = first_line(error)
        raise ModelError(
            f"the checkpoint is quantised ({method}), and its weights cannot be decompressed here: {first}",
            where=name,
            fix="install what it asks for, or convert the checkpoint that it was quantised from",
        ) from error
    return {"quantization_config": settings}


def check_whole(model: Any, name: str) -> None:
    """Raises ModelError for a model in memory whose weights are quantised."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        method = getattr(model, "quantization_method", None)
        raise _refused(name, str(getattr(method, "value", method or "unknown")))


def forget(model: Any, converted: bool) -> None:
    """A dequantised model still carries its quantizer: `save_pretrained` refuses it, or quantises again.

    Args:
        converted: it was read with :func:`reading`'s arguments.
    """
    if converted:
        vars(model).pop("_weight_conversions", None)  # saved as its class has it, not back into the checkpoint's form
    for part in model.modules():
        for holder, names in ((getattr(part, "config", None), ("quantization_config",)), (part, LEFT_BEHIND)):
            for name in names:
                if holder is not None and name in vars(holder):
                    delattr(holder, name)


def _refused(name: str, method: str) -> ModelError:
    return ModelError(
        f"the weights are quantised ({method})",
        where=name,
        cause="polynomials are fitted to the weights themselves, and transformers does not decompress these on loading",
        fix="convert the checkpoint that it was quantised from; or load it, call model.dequantize() where its kind has "
        "that, save it, and convert what was saved",
    )
