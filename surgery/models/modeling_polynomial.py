# Copyright 2026 The polysurgery authors. Licensed under the Apache License, Version 2.0.
"""Loads a polynomial twin: a transformers model whose feed-forward blocks are polynomials.

This file travels with the checkpoint and needs torch and transformers only. `config.json` holds the configuration of
the original architecture, plus

    "model_type": "polynomial_twin"
    "base_model_type": "...", "base_architecture": "..."
    "polynomial_format": 1
    "polynomial_blocks": [{"path": ..., "kind": ..., "degree": ..., ...}, ...]

The stock class is built from that configuration and the listed modules are replaced before the weights are loaded.
The model type is its own, so that a loader without this file stops instead of building the stock network around
missing weights.
"""

import copy
import os
import re
import shutil

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPE = "polynomial_twin"
FORMAT = 3  # the highest read here; see format_of
PREFIX = "Polynomial"  # of the names of the classes made here, before the base class's or the Auto class's
MAPPING = "_model_mapping"
PATHS = ("path", "first", "activation", "last", "half")  # what places a block's entry names


def multiply_add(row: torch.Tensor, a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """row + a·b; without gradients in the memory of `into`, since reading and writing it is what this costs."""
    if torch.is_grad_enabled():
        return torch.addcmul(row, a, b)
    return torch.addcmul(row, a, b, out=into)


def horner(coefficients: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Σ_k c_k u^k per unit; coefficients (degree + 1, h), ascending; u (..., h)."""
    if len(coefficients) == 1:
        return coefficients[0].expand_as(u)
    value = torch.addcmul(coefficients[-2], coefficients[-1], u)
    for row in reversed(coefficients[:-2].unbind(0)):
        value = multiply_add(row, value, u, into=value)
    return value


class PolynomialActivation(nn.Module):
    """Each unit's own polynomial, in the place of the activation: u ↦ Σ_{k≤n} a_k u^k."""

    def __init__(self, hidden: int, degree: int) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(degree + 1, hidden))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return horner(self.coefficients, u)


class PolynomialHalf(nn.Module):
    """The first half of a plain block, where the original has it in one module: x ↦ p(dense(x))."""

    def __init__(self, width: int, hidden: int, degree: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)
        self.activation = PolynomialActivation(hidden, degree)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(x))


class PolynomialGLU(nn.Module):
    """A gated block: x ↦ down(Σ_{k≤n} a_k u^k + v Σ_{k<n} b_k u^k), u = gate(x), v = up(x)."""

    def __init__(self, width: int, hidden: int, out: int, degree: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, out)
        self.coefficients = nn.Parameter(torch.zeros(degree + 1, hidden))
        self.cross_coefficients = nn.Parameter(torch.zeros(degree, hidden))

    def units(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        own, crossed = horner(self.coefficients, u), horner(self.cross_coefficients, u)
        return multiply_add(own, crossed, v, into=own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.units(self.gate_proj(x), self.up_proj(x)))


class BilinearGLU(nn.Module):
    """A quadratic gated block in bilinear form: x ↦ down(gate(x) ⊙ up(x)). Parameters named as in Llama."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, out)

    def units(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return u * v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.units(self.gate_proj(x), self.up_proj(x)))


class PolynomialExperts(nn.Module):
    """Experts, each with polynomials of its own: x_t ↦ Σ_j w_tj p_{e_tj}(x_t); `hidden` 0 makes them affine.

    Numbers past the last expert's stand for none, or, where `passes`, for x_t itself. Without numbers, the inputs are
    there once for each expert, zero where a token goes elsewhere.
    """

    def __init__(
        self, experts: int, width: int, hidden: int, out: int, degree: int, gated: bool, passes: bool = False
    ) -> None:
        super().__init__()
        self.gated, self.degree, self.passes = gated, degree, passes
        names = {"down_weight": (out, hidden or width), "down_bias": (out,)}
        if hidden:
            names |= {"gate_weight": (hidden, width), "gate_bias": (hidden,), "coefficients": (degree + 1, hidden)}
        if hidden and gated:
            names |= {"up_weight": (hidden, width), "up_bias": (hidden,), "cross_coefficients": (degree, hidden)}
        self.number = experts
        for name, shape in names.items():
            setattr(self, name, nn.Parameter(torch.zeros(experts, *shape)))

    def one(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """One expert's polynomial."""
        hidden = x
        if self.degree > 1:
            u = nn.functional.linear(x, self.gate_weight[number], self.gate_bias[number])
            hidden = horner(self.coefficients[number], u)
            if self.gated:
                v = nn.functional.linear(x, self.up_weight[number], self.up_bias[number])
                hidden = multiply_add(hidden, horner(self.cross_coefficients[number], u), v, into=hidden)
        return nn.functional.linear(hidden, self.down_weight[number], self.down_bias[number])

    def forward(self, hidden_states, top_k_index=None, top_k_weights=None):
        if top_k_index is None:
            return self.each(hidden_states)
        if top_k_index.dim() == 3:  # one-hot, with all zero for none
            top_k_index = torch.where(top_k_index.any(-1), top_k_index.argmax(-1), self.number)
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])
        total = x.new_zeros(len(x), self.down_bias.shape[-1])
        for number in range(self.number):
            rows, place = torch.where(top_k_index == number)
            if len(rows):
                output = self.one(number, x[rows]) * top_k_weights[rows, place, None]
                total.index_add_(0, rows, output.to(total.dtype))
        if self.passes:
            rows, place = torch.where(top_k_index >= self.number)
            total.index_add_(0, rows, (x[rows] * top_k_weights[rows, place, None]).to(total.dtype))
        return total.view(*shape[:-1], -1)

    def each(self, hidden_states):
        x = hidden_states.view(self.number, -1, hidden_states.shape[-1])
        total = x.new_zeros(*x.shape[:2], self.down_bias.shape[-1])
        for number in range(self.number):
            rows = x[number].any(-1)
            total[number, rows] = self.one(number, x[number, rows]).to(total.dtype)
        return total.view(-1, total.shape[-1])


def format_of(blocks: list) -> int:
    """The lowest format in which these entries can be told: 3 for halves, 2 for experts that pass tokens on, else 1."""
    if any("half" in block for block in blocks):
        return 3
    return 2 if any("passes" in block for block in blocks) else 1


def build(block: dict) -> dict[str, nn.Module]:
    """The modules that one entry of `polynomial_blocks` stands for, by the path they go to."""
    width, hidden, out = block["width"], block["hidden"], block["out"]
    if block["kind"] == "gated":
        return {block["path"]: PolynomialGLU(width, hidden, out, block["degree"])}
    if block["kind"] == "bilinear":
        return {block["path"]: BilinearGLU(width, hidden, out)}
    if block["kind"] == "affine":
        return {block["path"]: nn.Linear(width, out)}
    if block["kind"] == "plain" and "half" in block:
        half = PolynomialHalf(width, hidden, block["degree"])
        return {block["half"]: half, block["last"]: nn.Linear(hidden, out)}
    if block["kind"] == "plain":
        return {
            block["first"]: nn.Linear(width, hidden),
            block["activation"]: PolynomialActivation(hidden, block["degree"]),
            block["last"]: nn.Linear(hidden, out),
        }
    if block["kind"] == "experts":
        flags = block["gated"], block.get("passes", False)
        return {block["path"]: PolynomialExperts(block["experts"], width, hidden, out, block["degree"], *flags)}
    if block["kind"] == "plain_affine":
        return {block["first"]: nn.Identity(), block["activation"]: nn.Identity(), block["last"]: nn.Linear(width, out)}
    raise ValueError(f"unknown kind of polynomial block {block['kind']!r} at {block['path']}: is this file too old?")


def install(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at a dotted path. Plain functions (an activation kept as an attribute) are replaced too."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if not isinstance(parent, (nn.ModuleList, nn.Sequential)) and not hasattr(parent, name):
        raise ValueError(f"there is nothing at {path} to replace: the base architecture is not the expected one")
    if isinstance(parent, nn.ModuleList):
        parent[int(name)] = module
    elif name in parent._modules and isinstance(module, nn.Module):
        parent._modules[name] = module  # in its place: the order is what nn.Sequential computes in
    else:
        parent._modules.pop(name, None)  # a function cannot be assigned over a registered module
        setattr(parent, name, module)


def has_place(model: nn.Module, path: str) -> bool:
    """Whether there is something at a dotted path."""
    for name in path.split("."):
        children = getattr(model, "_modules", {})
        if name not in children and not hasattr(model, name):
            return False
        model = children[name] if name in children else getattr(model, name)
    return True


def moved(model: nn.Module, block: dict) -> dict:
    """An entry of `polynomial_blocks` with its paths as they are in `model`: in a class without a head, or with another
    one, than the class the entry was written for, they begin otherwise."""
    prefix = model.base_model_prefix + "."

    def found(path):
        for other in (path, path.removeprefix(prefix), prefix + path):
            if has_place(model, other):
                return other
        raise ValueError(f"there is nothing at {path} in {type(model).__name__}, to which this twin cannot be loaded")

    return block | {name: found(block[name]) for name in PATHS if isinstance(block.get(name), str) and block[name]}


_REGISTERED: list[bool] = []
_MODELS: dict[str, type] = {}
_CONFIGS: dict[str, type] = {}
_DISPATCHERS: dict[str, type] = {}


class PolynomialConfig(PreTrainedConfig):
    """The original architecture's configuration under this package's model type."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        base_type = config_dict.get("base_model_type")
        if cls is not PolynomialConfig or base_type is None:
            return super().from_dict(config_dict, **kwargs)
        if config_dict.get("polynomial_format", 0) > FORMAT:
            raise ValueError(f"this twin has format {config_dict['polynomial_format']}; this file reads up to {FORMAT}")
        found = config_class_for(base_type).from_dict(config_dict, **kwargs)
        leave_blocks_whole(found[0] if isinstance(found, tuple) else found)
        return found

    def __reduce__(self):
        base_type = getattr(self, "base_model_type", None)
        if base_type is None:
            return super().__reduce__()
        return restored_config, (base_type, self.__dict__)


def leave_blocks_whole(config) -> None:
    """Takes blocks with coefficients out of the base architecture's plan for tensor parallelism.

    The plan divides a block's units among processes; coefficients, which it does not know, stay those of all units. So
    every process computes such a block whole. Bilinear blocks have none, and are divided as the plan says.
    """
    plan, blocks = getattr(config, "base_model_tp_plan", None), getattr(config, "polynomial_blocks", None)
    if plan and blocks:
        paths = [block[name] for block in blocks if block["kind"] != "bilinear" for name in PATHS if block.get(name)]
        places = {re.sub(r"\.\d+\b", ".*", str(path)).split(".", place)[-1] for path in paths for place in (0, 1)}
        config.base_model_tp_plan = {
            name: style
            for name, style in plan.items()
            if not any(f"{name}.".startswith(f"{place}.") or f"{place}.".startswith(f"{name}.") for place in places)
        }


def restored_config(base_model_type: str, values: dict):
    """A pickled configuration: its class, which is made here, is not one that pickle finds by its name."""
    config_class = config_class_for(base_model_type)
    config = config_class.__new__(config_class)
    config.__dict__.update(values)
    return config


def config_class_for(base_model_type: str) -> type:
    """A configuration class that is the base architecture's, with our model type."""
    if base_model_type not in _CONFIGS:
        base = CONFIG_MAPPING[base_model_type]
        members = {
            "model_type": MODEL_TYPE,
            "__module__": __name__,
            "__eq__": object.__eq__,
            "__hash__": object.__hash__,
        }
        # The name is what the Auto classes compare with `PolynomialModel.config_class`.
        _CONFIGS[base_model_type] = type(PolynomialConfig.__name__, (base, PolynomialConfig), members)
        if _REGISTERED:
            _register_models(_CONFIGS[base_model_type])
    return _CONFIGS[base_model_type]


class PolynomialModel(PreTrainedModel):
    """Dispatches to a subclass of the original model class with its blocks replaced.

    Its subclasses `PolynomialAutoModel…` dispatch as the Auto class of that name does: `PolynomialAutoModel` to the
    model without a head, `PolynomialAutoModelForSequenceClassification` to the one with that head.
    """

    config_class = PolynomialConfig
    auto_class = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        if "config_for_dispatch" in cls.__dict__:
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        if not isinstance(config, PreTrainedConfig):
            keys = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download")
            wanted = {key: kwargs[key] for key in keys if key in kwargs}
            config = PolynomialConfig.from_pretrained(pretrained_model_name_or_path, **wanted)
        if hasattr(config, "polynomial_delta"):
            raise ValueError(
                f"this is a delta of {config.polynomial_delta['base']}, not a whole checkpoint: load it with "
                "polysurgery, surgery.load(NAME), or make it whole with `surgery export NAME --form full -o OUT`"
            )
        model_class = model_class_for(config, cls.auto_class)
        return model_class.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        if "config_for_dispatch" in cls.__dict__:
            return super()._from_config(config, **kwargs)
        return model_class_for(config, cls.auto_class)._from_config(config, **kwargs)


def model_class_for(config, auto_class=None) -> type:
    """The subclass of `config.base_architecture`, or of what `auto_class` has for it, that replaces its blocks."""
    name = config.base_architecture
    if auto_class is not None:
        base = getattr(transformers, name)
        classes = _classes(_mapping(auto_class).get(base.config_class, None))
        name = name if base in classes or classes[0] is None else classes[0].__name__
    return model_class(name, config.base_model_type)


def model_class(name: str, base_model_type: str) -> type:
    """The subclass of transformers' model class of this name that replaces its blocks on construction."""
    if name not in _MODELS:
        base = getattr(transformers, name)

        def __init__(self, config, *args, **kwargs):
            leave_blocks_whole(config)
            elsewhere = config.base_architecture != name
            config = copy.deepcopy(config) if elsewhere else config
            as_stock(base, self, config, *args, **kwargs)
            if elsewhere:
                config.polynomial_blocks = [moved(self, block) for block in config.polynomial_blocks]
                config.base_architecture = name
            for block in config.polynomial_blocks:
                for path, module in build(block).items():
                    install(self, path, module)
                    if block["kind"] in (
                        "experts",
                        "plain_affine",
                    ):  # some classes give these their first values from above
                        self.get_submodule(path.rpartition(".")[0])._is_hf_initialized = True

        def save_pretrained(self, save_directory, *args, **kwargs):
            # Names as in memory: what the base type renames on loading (GPT-NeoX's head), our model type does not.
            kwargs.setdefault("save_original_format", False)
            PreTrainedModel.save_pretrained(self, save_directory, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                shutil.copy(os.path.abspath(__file__), os.path.join(save_directory, "modeling_polynomial.py"))

        members = {
            "__init__": __init__,
            "__module__": __name__,
            "save_pretrained": save_pretrained,
            "config_class": config_class_for(base_model_type),
            "config_for_dispatch": True,
            # The base class fills its computed buffers in its own `_init_weights`, which custom code may be spared.
            "is_custom_code": classmethod(lambda cls: False),
            "_auto_class": None,  # else saving again would write this generated name into auto_map
        }
        _MODELS[name] = type(f"{PREFIX}{name}", (base, PolynomialModel), members)
        listed_with(name)
    return _MODELS[name]


def listed_with(name: str) -> None:
    """Enters the twin's class wherever transformers lists its original's, for pipelines look up there what they take.
    The lists go by model type; the twin's class name is none, so that no Auto class finds it by this entry."""
    for where, names in vars(modeling_auto).items():
        if where.endswith("_MAPPING_NAMES") and any(name in _classes(entry) for entry in names.values()):
            names.setdefault(f"{PREFIX}{name}", f"{PREFIX}{name}")


def as_stock(base: type, model: nn.Module, config, *args, **kwargs) -> None:
    """`base.__init__`. Heads that transformers shares between architectures ask an Auto class for the model below them,
    by the configuration's type: they are given the stock one meanwhile."""
    if not any(cls.__module__ == "transformers.modeling_layers" for cls in base.__mro__):
        base.__init__(model, config, *args, **kwargs)
        return
    ours = ("auto_map", "model_type", "architectures")
    values = {name: value for name, value in config.to_dict().items() if name not in ours}
    stock = CONFIG_MAPPING[config.base_model_type].from_dict(values)
    stock._attn_implementation = config._attn_implementation
    base.__init__(model, stock, *args, **kwargs)
    for part in model.modules():
        if type(getattr(part, "config", None)) is type(stock):
            part.config = config


def dispatcher(auto_class: str) -> type:
    """What `auto_class` loads a twin by."""
    if auto_class not in _DISPATCHERS:
        members = {"auto_class": auto_class, "__module__": __name__}
        _DISPATCHERS[auto_class] = type(f"{PREFIX}{auto_class}", (PolynomialModel,), members)
    return _DISPATCHERS[auto_class]


def __getattr__(name: str):
    """The classes made here, by their names, as pickle and `auto_map` ask for them."""
    base = name.removeprefix(PREFIX)
    if base != name and base in auto_classes():
        return dispatcher(base)
    if base != name and isinstance(getattr(transformers, base, None), type):
        return model_class(base, getattr(transformers, base).config_class.model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def auto_map(base_architecture: str) -> dict[str, str]:
    """Which Auto classes serve the base architecture, for config.json."""
    base = getattr(transformers, base_architecture)
    names = [name for name in auto_classes() if base.config_class in _mapping(name)]
    if not names:  # part of a larger architecture (Mllama's decoder), which no Auto class serves by itself
        names = ["AutoModelForCausalLM" if base_architecture.endswith("ForCausalLM") else "AutoModel"]
    found = {"AutoConfig": "modeling_polynomial.PolynomialConfig"}
    return found | {name: f"modeling_polynomial.{PREFIX}{name}" for name in names}


def auto_classes() -> list[str]:
    """Those of transformers' Auto classes that load models."""
    return [name for name in vars(modeling_auto) if name.startswith("AutoModel") and hasattr(_auto(name), MAPPING)]


def _auto(name: str):
    return getattr(modeling_auto, name)


def _mapping(auto_class: str):
    return getattr(_auto(auto_class), MAPPING)


def _classes(entry) -> tuple:
    return entry if isinstance(entry, tuple) else (entry,)


def register() -> None:
    """Lets the Auto classes load twins with no trust flag, in a process that imported this module on purpose."""
    if not _REGISTERED:
        _REGISTERED.append(True)
        AutoConfig.register(MODEL_TYPE, PolynomialConfig, exist_ok=True)
        for config_class in _CONFIGS.values():
            _register_models(config_class)


def _register_models(config_class: type) -> None:
    for name in auto_classes():
        _auto(name).register(config_class, dispatcher(name), exist_ok=True)
