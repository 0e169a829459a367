"""`import surgery` is enough for the Auto classes to load twins with no trust flag, and imports no transformers itself.

Where the Auto classes exist already, twins are registered at once; else right after they are first imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_MODULE = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Lets transformers' Auto classes load custom-code twins without `trust_remote_code`."""
    from surgery.models import modeling_polynomial

    modeling_polynomial.register()


def register_when_possible() -> None:
    """Now, or as soon as somebody imports the Auto classes."""
    if AUTO_MODULE in sys.modules:
        register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(importlib.abc.MetaPathFinder):
    """Sees the import of the Auto classes, lets the others find it, and has twins registered after it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        register()
