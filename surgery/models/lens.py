"""Twins in TransformerLens: each is bridged as its original is, whose modules around the blocks it has.

TransformerLens looks an adapter up by the name of a model's class, in lists of names that it keeps itself; its entry
points for other packages come too late, since a name that is not in the first of these lists is refused before. Where
it folds norms into weights (`enable_compatibility_mode`) it computes gated blocks by itself, and takes an activation
that it does not know for SiLU: `linear`, that of native twins, and the polynomials of custom ones are told to it here.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from surgery.models.modeling_polynomial import PREFIX, BilinearGLU, PolynomialGLU

FACTORY = "transformer_lens.factories.architecture_adapter_factory"
LISTS = "transformer_lens.utilities.architectures"  # which Auto class loads which
PARTS = "transformer_lens.model_bridge.generalized_components"
GATED = {"gate": "gate_proj", "in": "up_proj", "out": "down_proj"}
UNITS = {kind.__name__: kind.units for kind in (PolynomialGLU, BilinearGLU)}  # code of a checkpoint has its own classes


def register_adapters() -> None:
    """Every architecture that TransformerLens knows, once more for its custom twin; and the activation `linear`."""
    factory, lists = importlib.import_module(FACTORY), importlib.import_module(LISTS)
    for name, adapter in list(factory.SUPPORTED_ARCHITECTURES.items()):
        if not name.startswith(PREFIX):
            of_twin = factory.SUPPORTED_ARCHITECTURES.setdefault(PREFIX + name, adapter_of_twin(adapter))
            factory.ArchitectureAdapterFactory.register_adapter(PREFIX + name, of_twin)
    for kind, names in vars(lists).items():
        if isinstance(names, set):
            names.update([PREFIX + name for name in names if not name.startswith(PREFIX)])
        elif isinstance(names, frozenset):
            setattr(lists, kind, names | {PREFIX + name for name in names if not name.startswith(PREFIX)})
    for module in ("gated_mlp", "joint_gate_up_mlp"):
        part: Any = importlib.import_module(f"{PARTS}.{module}")
        if not hasattr(part.resolve_activation_fn, "others"):
            part.resolve_activation_fn = _Activations(part.resolve_activation_fn)


class _Activations:
    """TransformerLens's own choice of an activation, but for `linear`."""

    def __init__(self, others: Any) -> None:
        self.others = others

    def __call__(self, config: Any) -> Any:
        named = [getattr(config, name, None) for name in ("activation_function", "hidden_act", "act_fn")]
        return (lambda u: u) if "linear" in named else self.others(config)


def adapter_of_twin(adapter: Any) -> Any:
    """The original's adapter with gated blocks bridged as polynomials of two maps, also where the original's is one."""

    class Adapter(adapter):
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            parts = importlib.import_module(PARTS)
            inside = getattr((self.component_mapping or {}).get("blocks"), "submodules", {})
            for name, part in list(inside.items()):
                if isinstance(part, parts.JointGateUpMLPBridge):
                    maps = {key: parts.LinearBridge(name=path) for key, path in GATED.items()}
                    inside[name] = bridge_of_twin()(name=part.name, config=self.cfg, submodules=maps)
                elif isinstance(part, parts.GatedMLPBridge):
                    part.__class__ = bridge_of_twin()

    Adapter.__name__ = PREFIX + adapter.__name__
    return Adapter


@functools.cache
def bridge_of_twin() -> Any:
    """TransformerLens's bridge of a gated block, which multiplies with the block's own polynomials."""
    base: Any = importlib.import_module(PARTS).GatedMLPBridge

    class PolynomialMLPBridge(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            block = self.original_component
            units = UNITS.get(type(block).__name__)
            if units is None or not getattr(self, "_use_processed_weights", False):
                return super().forward(*args, **kwargs)
            x = self.hook_in(args[0])
            u = self.gate.hook_out(self.projected("gate", x))
            v = getattr(self, "in").hook_out(self.projected("in", x))
            hidden = self.out.hook_in(units(block, u, v))
            return self.hook_out(self.out.hook_out(self.projected("out", hidden)))

        def projected(self, name: str, x: Tensor) -> Tensor:
            """Of weights with the norm folded in, which versions of TransformerLens hold in different places."""
            if hasattr(self, "_processed_projection"):
                return linear(x, *self._processed_projection(name))
            return linear(x, getattr(self, f"_processed_W_{name}"), getattr(self, f"_processed_b_{name}"))

    return PolynomialMLPBridge
