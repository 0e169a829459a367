"""Turns a fitted block into modules, and decides which form a twin can take.

* native: a stock transformers checkpoint. A quadratic gated block is bilinear, and an architecture whose block has an
  `mlp_bias` and an activation by name carries it as it is, with the activation "linear".
* custom: the original architecture with blocks from :mod:`surgery.modeling_polynomial`, which travels along.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery import modeling_polynomial as modeling
from surgery.blocks import Block
from surgery.fit import FittedBlock
from surgery.fit_experts import FittedExperts
from surgery.polynomial import Affine, bilinear

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
        if block.kind != "gated":
            return None
        for name in list(expected):
            if name.startswith(block.path + "."):
                del expected[name]
        for part, shape in (
            ("gate_proj", (hidden, block.width)), ("up_proj", (hidden, block.width)), ("down_proj", (block.out, hidden))
        ):  # fmt: skip
            expected[f"{block.path}.{part}.weight"] = shape
            expected[f"{block.path}.{part}.bias"] = shape[:1]
    try:
        with torch.device("meta"):
            stock = type(model)._from_config(config)
    except Exception:
        return None
    shapes = {name: tuple(value.shape) for name, value in stock.state_dict().items()}
    return config if shapes == expected else None


def describe(fitted: FittedBlock | FittedExperts, native: bool) -> dict[str, Any]:
    """The entry of `polynomial_blocks` that rebuilds a block's modules."""
    block = fitted.block
    if isinstance(fitted, FittedExperts):
        return {
            "path": block.path, "kind": "experts", "degree": fitted.degree, "experts": len(fitted.experts),
            "width": block.width, "hidden": max(_hidden(one) for one in fitted.experts), "out": block.out,
            "gated": any(one.up is not None for one in fitted.experts), **({"passes": True} if fitted.passes else {}),
        }  # fmt: skip
    hidden = _hidden(fitted)
    if block.kind == "plain":
        kind = "plain_affine" if fitted.degree == 1 else "plain"
    else:
        kind = "affine" if fitted.degree == 1 else ("bilinear" if native else "gated")
    entry = {
        "path": block.path, "kind": kind, "degree": fitted.degree,
        "width": block.width, "hidden": hidden, "out": block.out,
    }  # fmt: skip
    if block.kind == "plain":
        entry |= {"first": block.first[0], "activation": block.activation_path, "last": block.last}
        if block.half:
            entry |= _in_half(block.half, affine=kind == "plain_affine")
    return entry


def _in_half(half: str, affine: bool) -> dict[str, str]:
    """Where the parts of a plain block are that takes the place of a module σ(first x)."""
    if affine:
        return {"first": half, "activation": half}
    return {"half": half, "first": f"{half}.dense", "activation": f"{half}.activation"}


def _hidden(fitted: FittedBlock) -> int:
    return 0 if fitted.gate is None else len(fitted.gate.bias)


def modules_for(fitted: FittedBlock | FittedExperts, native: bool, like: Tensor) -> dict[str, nn.Module]:
    """The block's modules with their weights, by path; dtype and device as `like`."""
    entry = describe(fitted, native)
    with torch.device("meta"):
        modules = modeling.build(entry)
    modules = {path: module.to_empty(device=like.device).to(like.dtype) for path, module in modules.items()}
    for module in modules.values():
        module.train(False)
    if isinstance(fitted, FittedExperts):
        for number, one in enumerate(fitted.experts):
            _fill_expert(modules[fitted.block.path], number, one)
        return modules
    units, gate, up = fitted.units, fitted.gate, fitted.up
    if entry["kind"] in ("affine", "plain_affine"):
        _fill(modules[fitted.block.last if entry["kind"] == "plain_affine" else fitted.block.path], fitted.readout)
        return modules
    assert units is not None and gate is not None
    if entry["kind"] == "plain":
        _fill(_inside(modules, entry["first"]), gate)
        _set(_inside(modules, entry["activation"]).coefficients, units.a.T)
        _fill(modules[entry["last"]], fitted.readout)
        return modules
    module = modules[fitted.block.path]
    assert up is not None and units.b is not None
    if entry["kind"] == "bilinear":
        form = bilinear(units, gate, up)
        gate, up = form.gate, form.up
        readout = Affine(fitted.readout.weight, fitted.readout.bias + fitted.readout.weight @ form.remainder)
    else:
        _set(module.coefficients, units.a.T)
        _set(module.cross_coefficients, units.b.T)
        readout = fitted.readout
    for part, affine in (("gate_proj", gate), ("up_proj", up), ("down_proj", readout)):
        _fill(module.get_submodule(part), affine)
    return modules


def _inside(modules: Mapping[str, nn.Module], path: str) -> Any:
    """The module at a path that may lie within one of `modules`."""
    root = next(root for root in modules if f"{path}.".startswith(f"{root}."))
    return modules[root].get_submodule(path[len(root) + 1 :])


def _set(parameter: Any, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value.to(parameter))


def _fill(module: nn.Module, affine: Affine) -> None:
    _set(module.weight, affine.weight)
    _set(module.bias, affine.bias)


def _fill_expert(module: Any, number: int, fitted: FittedBlock) -> None:
    """Units that an expert has fewer of than the others stay zero."""
    values: dict[str, Tensor] = {"down_weight": fitted.readout.weight, "down_bias": fitted.readout.bias}
    if fitted.gate is not None and fitted.units is not None:
        values |= {"gate_weight": fitted.gate.weight, "gate_bias": fitted.gate.bias, "coefficients": fitted.units.a.T}
        if fitted.up is not None and fitted.units.b is not None:
            values |= {"up_weight": fitted.up.weight, "up_bias": fitted.up.bias}
            values |= {"cross_coefficients": fitted.units.b.T}
    with torch.no_grad():
        for name, value in values.items():
            place = getattr(module, name)[number].zero_()
            place[tuple(slice(0, size) for size in value.shape)] = value.to(place)


def widen(module: nn.Module, hidden: int) -> None:
    """Pads a BilinearGLU with units that are zero, so that all blocks of a native twin have one width."""
    assert isinstance(module, modeling.BilinearGLU)
    extra = hidden - module.gate_proj.out_features
    if extra == 0:
        return
    for part in (module.gate_proj, module.up_proj):
        part.weight = nn.Parameter(nn.functional.pad(part.weight.detach(), (0, 0, 0, extra)))
        part.bias = nn.Parameter(nn.functional.pad(part.bias.detach(), (0, extra)))
        part.out_features = hidden
    module.down_proj.weight = nn.Parameter(nn.functional.pad(module.down_proj.weight.detach(), (0, extra)))
    module.down_proj.in_features = hidden


def finish_native(model: Any, blocks: Sequence[Block]) -> None:
    """Equal widths, and the configuration of the stock class that this model now is."""
    modules = [model.get_submodule(block.path) for block in blocks]
    hidden = max(module.gate_proj.out_features for module in modules)
    for module in modules:
        widen(module, hidden)
    config = native_config(model, blocks, hidden)
    assert config is not None, "the native form was possible before the blocks were swapped"
    model.config.__dict__.update(config.__dict__)


def finish_custom(model: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """Turns the model into an instance of the twin's own class, so that it saves, and saves again, as one.

    A twin some of whose blocks were left as they were may be converted further: then the entries are added.
    """
    described = [dict(entry) for entry in entries]
    if isinstance(model, modeling.PolynomialModel):
        model.config.polynomial_blocks = [*model.config.polynomial_blocks, *described]
        model.config.polynomial_format = modeling.format_of(model.config.polynomial_blocks)
    else:
        values = model.config.to_dict()
        architecture, base_type = type(model).__name__, model.config.model_type
        values |= {
            "model_type": modeling.MODEL_TYPE,
            "base_model_type": base_type,
            "base_architecture": architecture,
            "architectures": [f"Polynomial{architecture}"],
            "polynomial_format": modeling.format_of(described),
            "polynomial_blocks": described,
            "auto_map": modeling.auto_map(architecture),
        }
        config: Any = modeling.config_class_for(base_type)
        config = config.from_dict(values)
        config._attn_implementation = model.config._attn_implementation
        model.__class__ = modeling.model_class_for(config)
        set_config(model, config)


def set_config(model: Any, config: Any) -> None:
    """Gives a model another configuration, and those of its parts that shared the old one."""
    before = model.config
    for part in model.modules():
        if getattr(part, "config", None) is before:
            part.config = config
