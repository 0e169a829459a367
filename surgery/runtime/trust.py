"""Whether the code that a checkpoint brings for its tokenizer may be run. Never asked for; no by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)


def trusted() -> bool:
    """Whether such code may be run now."""
    return _TRUSTED.get()


def trust(value: bool) -> None:
    """Says so for all that follows, as `--trust-remote-code` does."""
    _TRUSTED.set(value)


@contextmanager
def trusting_remote_code() -> Iterator[None]:
    """Inside `with surgery.trusting_remote_code():` tokenizers may run the code that a checkpoint brings for them."""
    before = _TRUSTED.set(True)
    try:
        yield
    finally:
        _TRUSTED.reset(before)
