"""Files: written under a temporary name and renamed, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, several: bool = False) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place when the body ends well and is removed when it does not.

    A reader sees the old file or the new one. The folder is made where it is missing. What a kill leaves under the
    temporary name is written over by the next run.

    Args:
        several: several processes may write this file at once; each has a temporary name of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if several else f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Atomically, see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Indented, atomically; options as `json.dumps` takes them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, **options) + "\n")


def sha256(file: Path) -> str:
    """Of a file's bytes, as the Hub records large files."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()
