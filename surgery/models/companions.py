"""What stands beside a model's weights and its twin needs too: processors, chat templates, tokenizer files, licences.

Whatever transformers would read travels with the twin; what does not is named in the report, and why.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import first_line

Fetch = Callable[[str], Path]

TRAVEL = re.compile(
    r"(preprocessor|processor|video_preprocessor|audio_tokenizer|generation)_config\.json"
    r"|chat_template\.(json|jinja)|additional_chat_templates/[^/]+\.jinja|custom_generate/.+"
    r"|modules\.json|(sentence_bert_config|config_sentence_transformers)\.json|\d+_\w+/[^/]+"  # sentence-transformers
    r"|(LICENSE|LICENCE|NOTICE|USE_POLICY)[^/]*",
    re.IGNORECASE,
)
TOKENIZER = re.compile(
    r"(tokenizer(_config)?|special_tokens_map|added_tokens|vocab|tekken|normalizer|bpe_codes)\.json"
    r"|(vocab|merges)\.txt|[^/]*\.(model|tiktoken|spm|bpe|vocab|codes)"
)
WRITTEN_ANEW = re.compile(
    r"config\.json|[^/]*\.index\.json|[^/]*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|tflite)"
    r"|README\.md|\.git.*|surgery\.json|modeling_polynomial\.py"
)
WITH_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
OF_THE_MODEL = re.compile(r"AutoConfig|AutoModel.*")
MOST_NAMED = 20


@dataclass(frozen=True)
class Companions:
    """Files to be written beside a twin's weights.

    Attributes:
        files: local files by their names in the checkpoint; what is written there otherwise stays.
        missing: names of what should travel and could not be had, and why.
        left: other files of the original, which nothing here reads.
        tokenizer: why the original's tokenizer does not load; empty where it does, or where there is none.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    tokenizer: str = ""

    def write(self, folder: Path) -> None:
        """Beside what stands in the folder already."""
        for name, file in self.files.items():
            place = folder / name
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)

    def as_dict(self) -> dict[str, Any]:
        """As reported."""
        known = {"copied": sorted(self.files), "missing": dict(self.missing), "left": list(self.left[:MOST_NAMED])}
        return known | ({"tokenizer": self.tokenizer} if self.tokenizer else {})

    @property
    def note(self) -> str:
        """A plain word on what could not be had; empty where all is there."""
        return "; ".join(f"{name} is not in the twin: {why}" for name, why in self.missing.items())


def companions(path: str, kind: str, revision: str | None, tokenizer: str = "") -> Companions:
    """Of a checkpoint in a folder or on the Hub.

    Args:
        path, kind: see :func:`surgery.models.loading.locate`; of other kinds there are none.
        tokenizer: why its tokenizer does not load.
    """
    if kind == "folder":
        root = Path(path)
        return _chosen(_inside(root), lambda name: root / name, tokenizer)
    if kind == "hub":
        return _chosen(_on_the_hub(path, revision), lambda name: _fetched(path, name, revision), tokenizer)
    return Companions(tokenizer=tokenizer)


def has_tokenizer(path: str, kind: str, revision: str | None) -> bool:
    """Whether there are files of a tokenizer, so that it should load."""
    if kind == "gguf":
        return True
    names = [file.name for file in Path(path).iterdir()] if kind == "folder" else _on_the_hub(path, revision)
    return any(TOKENIZER.fullmatch(name) for name in names)


def _inside(root: Path) -> list[str]:
    """Names of the files in a folder, and in its folders, but in no deeper ones (a training run's checkpoints)."""
    found = (*root.glob("*"), *root.glob("*/*"))
    return [file.relative_to(root).as_posix() for file in found if file.is_file()]


def _chosen(every: Collection[str], fetch: Fetch, tokenizer: str) -> Companions:
    names = [name for name in every if name.count("/") <= 1 and not any(part[:1] == "." for part in name.split("/"))]
    files: dict[str, Path] = {}
    missing: dict[str, str] = {}

    def take(wanted: Iterable[str]) -> None:
        for name in sorted(set(wanted) - files.keys() - missing.keys()):
            try:
                files[name] = fetch(name)
            except Exception as error:
                first = first_line(error)
                missing[name] = first

    take(name for name in names if TRAVEL.fullmatch(name) or TOKENIZER.fullmatch(name))
    code = _code(files, fetch if "config.json" in names else None)
    while code:
        for name in code - set(names):
            missing[name] = "the configuration names it, and it is not in the checkpoint"
        take(code & set(names))
        read = code & files.keys()
        code = {other for name in read for other in _imported(files[name])} - files.keys() - missing.keys()
    known = {*files, *missing}
    left = sorted(name for name in names if name not in known and not WRITTEN_ANEW.fullmatch(name))
    return Companions(files, missing, tuple(left), tokenizer)


def _code(files: Mapping[str, Path], fetch: Fetch | None) -> set[str]:
    """Python files that configurations name as the code of tokenizers and processors; the model's own is not used."""
    found: set[str] = set()
    for name in WITH_CODE:
        if name in files or (name == "config.json" and fetch is not None):
            try:
                file = files[name] if name in files else fetch(name)  # type: ignore[misc]
                value = json.loads(Path(file).read_text(encoding="utf-8"))
            except Exception:  # whatever cannot be read is reported where it is needed
                continue
            found |= {reference.split(".")[0] + ".py" for reference in _references(value.get("auto_map"))}
    return found


def _references(auto_map: Any) -> list[str]:
    """References to code of this checkpoint in an `auto_map`, as in tokenization_x.XTokenizer."""
    if isinstance(auto_map, dict):
        named = [value for key, value in auto_map.items() if not OF_THE_MODEL.fullmatch(key)]
    else:
        named = [auto_map]
    flat = [part for value in named for part in (value if isinstance(value, list | tuple) else [value])]
    return [part for part in flat if isinstance(part, str) and re.fullmatch(r"\w+\.\w+", part)]


def _imported(file: Path) -> set[str]:
    """Files beside a Python file that it imports."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return {f"{name}.py" for name in re.findall(r"^\s*from\s+\.(\w+)\s+import", text, re.MULTILINE)}


def _on_the_hub(repo: str, revision: str | None) -> list[str]:
    """Names of a repository's files; of those in the cache where the Hub is not to be reached."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return list(HfApi().list_repo_files(repo, revision=revision))
    except Exception:
        config = try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(config, str):
            return []
        return _inside(Path(config).parent)


def _fetched(repo: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=revision))
