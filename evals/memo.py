"""Finished measurements, kept by what they depend on: how interrupted runs resume and originals are not run twice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.runtime.files import cache_folder, replacing


def default_folder() -> Path:
    """Where measurements are kept."""
    return cache_folder("evals")


@dataclass
class Memo:
    """JSON files named by the hash of everything a measurement depends on.

    Attributes:
        folder: None keeps nothing.
        reused: names of the measurements that were here before.
        made: files of this run.
    """

    folder: Path | None
    reused: list[str] = field(default_factory=list)
    made: set[Path] = field(default_factory=set)

    def _file(self, key: Any) -> Path:
        assert self.folder is not None
        text = json.dumps(key, sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def find(self, name: str, key: Any) -> Any | None:
        """What was kept under this key, or None; `name` is what `reused` calls it, no part of the key."""
        if self.folder is None or not self._file(key).is_file():
            return None
        try:
            found = json.loads(self._file(key).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        if self._file(key) not in self.made:
            self.reused.append(name)
        return found

    def keep(self, key: Any, value: Any) -> None:
        """Under everything that the value depends on."""
        if self.folder is None:
            return
        with replacing(self._file(key), several=True) as temporary:
            temporary.write_text(json.dumps(value, default=str), encoding="utf-8")
        self.made.add(self._file(key))


def model_fingerprint(name: str, revision: str | None) -> str:
    """SHA-256 of a local model's configuration and weight files; the commit of one on the Hub."""
    path = Path(name).expanduser()
    if not path.exists():
        return f"hub:{name}@{revision}"
    suffixes = (".safetensors", ".bin", ".gguf", ".json", ".py")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in suffixes)
    digest = hashlib.sha256()
    for file in files:
        if file.name == "surgery.json":  # says how, not what
            continue
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
