"""Hooks on modules that go when they are no longer wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Inside, the hooks with these handles hang; afterwards they are removed, whatever happened."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
