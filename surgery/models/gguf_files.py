"""GGUF files as transformers reads them, but once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import transformers

ASKED_AGAIN = ("GGUFReader", "get_tensor_name_map")


def gguf_config(file: Path) -> Any:
    """The configuration in a file, which is parsed anew only when the file has changed."""
    state = file.stat()
    return copy.deepcopy(_config(file, state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=4)
def _config(file: Path, modified: int, size: int) -> Any:
    return transformers.AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)


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
