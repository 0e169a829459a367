"""GGUF files as transformers reads them, but once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

ASKED_AGAIN = ("GGUFReader", "get_tensor_name_map")


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Inside, a file's fields, and how an architecture names its tensors, are made once and then remembered.

    transformers asks for the former with the configuration, the tokenizer and the weights, and for the latter with
    every module: two thirds of the time that a small model takes to load. Neither is changed by those who ask.
    """
    from transformers.utils import is_gguf_available

    if not is_gguf_available():  # transformers says so
        yield
        return
    import gguf

    made = {name: getattr(gguf, name) for name in ASKED_AGAIN}
    if any(hasattr(make, "cache_info") for make in made.values()):  # remembered already
        yield
        return
    for name, make in made.items():
        setattr(gguf, name, cache(make))
    try:
        yield
    finally:
        for name, make in made.items():
            setattr(gguf, name, make)
