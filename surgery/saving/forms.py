"""Which form a twin can take, native or custom, and what a network needs to be one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from surgery.blocks.block import Block
from surgery.models import modeling_polynomial
from surgery.models.companions import OF_THE_MODEL

ACTIVATION_KEYS = ("hidden_act", "hidden_activation")


def native_config(model: Any, blocks: Sequence[Block], hidden: int) -> Any | None:
    """The configuration under which the stock class is this twin, or None.

    The architecture itself is asked: its class is built on the meta device from the changed configuration, and must
    then have biased gate, up and down maps of the new width in every block, and nothing else changed.
    """
    config = copy.deepcopy(model.config)
    keys = [key for key in ACTIVATION_KEYS if isinstance(getattr(config, key, None), str)]
    if not blocks or not keys or not hasattr(config, "mlp_bias") or not hasattr(config, "intermediate_size"):
        return None
    try:
        for key in keys:
            setattr(config, key, "linear")
        config.mlp_bias, config.intermediate_size = True, hidden
    except Exception:  # a configuration that knows one activation only
        return None
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for block in blocks:
        if not block.takes_native_form:
            return None
        for name in list(expected):
            if name.startswith(block.path + "."):
                del expected[name]
        for part, shape in (
            ("gate_proj", (hidden, block.width)),
            ("up_proj", (hidden, block.width)),
            ("down_proj", (block.out, hidden)),
        ):
            expected[f"{block.path}.{part}.weight"] = shape
            expected[f"{block.path}.{part}.bias"] = shape[:1]
    try:
        with torch.device("meta"):
            stock = type(model)._from_config(config)
    except Exception:
        return None
    shapes = {name: tuple(value.shape) for name, value in stock.state_dict().items()}
    return config if shapes == expected else None


def widen(module: nn.Module, hidden: int) -> None:
    """Pads a BilinearGLU with units that are zero, so that all blocks of a native twin have one width."""
    assert isinstance(module, modeling_polynomial.BilinearGLU)
    extra = hidden - module.gate_proj.out_features
    if extra == 0:
        return
    for part in (module.gate_proj, module.up_proj):
        part.weight = nn.Parameter(nn.functional.pad(part.weight.detach(), (0, 0, 0, extra)))
        part.bias = nn.Parameter(nn.functional.pad(part.bias.detach(), (0, extra)))
        part.out_features = hidden
    module.down_proj.weight = nn.Parameter(nn.functional.pad(module.down_proj.weight.detach(), (0, extra)))
    module.down_proj.in_features = hidden


def other_code(config: Any) -> dict[str, Any]:
    """What a configuration's `auto_map` names beside the model's own code, which a twin does not run."""
    named = getattr(config, "auto_map", None) or {}
    return {key: value for key, value in named.items() if not OF_THE_MODEL.fullmatch(key)}


def finish_native(model: Any, blocks: Sequence[Block]) -> None:
    """Equal widths, and the configuration of the stock class that this model now is."""
    modules = [model.get_submodule(block.path) for block in blocks]
    hidden = max(module.gate_proj.out_features for module in modules)
    for module in modules:
        widen(module, hidden)
    config = native_config(model, blocks, hidden)
    assert config is not None, "the native form was possible before the blocks were swapped"
    model.config.__dict__.update(config.__dict__)
    others = other_code(model.config)
    if others:
        model.config.auto_map = others
    elif hasattr(model.config, "auto_map"):
        del model.config.auto_map


def finish_custom(model: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """Turns the model into an instance of the twin's own class, so that it saves, and saves again, as one.

    A twin some of whose blocks were left as they were may be converted further: then the entries are added.
    """
    described = [dict(entry) for entry in entries]
    if isinstance(model, modeling_polynomial.PolynomialModel):
        model.config.polynomial_blocks = [*model.config.polynomial_blocks, *described]
        model.config.polynomial_format = modeling_polynomial.format_of(model.config.polynomial_blocks)
    else:
        values = model.config.to_dict()
        architecture, base_type = type(model).__name__, model.config.model_type
        values |= {
            "model_type": modeling_polynomial.MODEL_TYPE,
            "base_model_type": base_type,
            "base_architecture": architecture,
            "architectures": [f"Polynomial{architecture}"],
            "polynomial_format": modeling_polynomial.format_of(described),
            "polynomial_blocks": described,
            "auto_map": other_code(model.config) | modeling_polynomial.auto_map(architecture),
        }
        config: Any = modeling_polynomial.config_class_for(base_type)
        config = config.from_dict(values)
        config._attn_implementation = model.config._attn_implementation
        model.__class__ = modeling_polynomial.model_class_for(config)
        set_config(model, config)


def set_config(model: Any, config: Any) -> None:
    """Gives a model another configuration, and those of its parts that shared the old one."""
    before = model.config
    for part in model.modules():
        if getattr(part, "config", None) is before:
            part.config = config
