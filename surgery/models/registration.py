"""`import surgery` is enough for the Auto classes to load twins with no trust flag, and imports no transformers itself.

Where the Auto classes exist already, twins are registered at once; else right after they are first imported. The same
holds for TransformerLens and its list of architectures.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_MODULE = "transformers.models.auto.modeling_auto"
LENS_MODULE = "transformer_lens.factories.architecture_adapter_factory"


def register() -> None:
    """Lets transformers' Auto classes load custom-code twins without `trust_remote_code`."""
    from surgery.models import modeling_polynomial

    modeling_polynomial.register()


def _register_with_lens() -> None:
    from surgery.models import lens

    try:
        lens.register_adapters()
    except (ImportError, AttributeError) as error:  # a version that is built otherwise goes on without twins
        warnings.warn(f"this version of TransformerLens takes no custom twins: {error}", stacklevel=2)


WHEN: dict[str, Callable[[], None]] = {AUTO_MODULE: register, LENS_MODULE: _register_with_lens}


def register_when_possible() -> None:
    """Now, or as soon as somebody imports what twins are registered with."""
    for name, then in WHEN.items():
        if name in sys.modules:
            then()
        elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting(name, then))


class _Waiting(importlib.abc.MetaPathFinder):
    """Sees the import of a module, lets the others find it, and has twins registered after it."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self.then)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then()
