"""Texts by name → documents and token ids.

python              English that ships with Python: its language reference and the docstrings of its library
code                the source code of Python's library
FILE                plain text, JSON lines or JSON, see :mod:`surgery.calibration.text_files`
hub:NAME[:CONFIG[:SPLIT]]   a Hub dataset with a "text" column (needs `datasets`)
hub:NAME@COMMIT/FILE        one .json(l)(.gz) file of a Hub dataset, see :mod:`surgery.calibration.hub_files`
"""

from __future__ import annotations

import ast
import sysconfig
from array import array
from collections.abc import Iterable, Iterator
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.hub_files import hub_file_texts, is_hub_file
from surgery.calibration.text_files import (
    Chat,
    Messages,
    Unfinished,
    file_texts,
    in_parts,
    plain_chat,
    text_of,
)
from surgery.errors import CalibrationError, RecipeError, did_you_mean, first_line

AUTO, SAMPLES, BROAD = "auto", "samples", "broad"
BUILT_IN = ("python", "code", SAMPLES, BROAD)
MODULES_PER_TOPIC = 4  # there are about four modules with long docstrings to a topic of the language reference
CHARACTERS_PER_TOKEN = 6  # an overestimate of English, so that enough text is read and no more


def documents(source: str, chat: Chat = plain_chat) -> Iterator[str]:
    """The texts of a text source, in order, a long file in parts; chat messages as `chat` writes them."""
    if source == "python":
        yield from _python_english()
    elif source == "code":
        yield from _python_code(Path(sysconfig.get_paths()["stdlib"]))
    elif is_hub_file(source):
        yield from hub_file_texts(source, chat)
    elif source.startswith("hub:"):
        yield from _hub_texts(source, chat)
    elif source in (AUTO, SAMPLES, BROAD):
        raise CalibrationError(
            "this is not one text that can be read here",
            where=source,
            cause="samples are drawn from a model, and broad is a mixture; `convert` and `refine` take them",
            fix="give python, code, hub:NAME or a text file",
        )
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            known = ", ".join(BUILT_IN)
            raise CalibrationError(
                "there is no such file",
                where=str(path),
                fix=f"give a .txt, .jsonl or .safetensors file, hub:NAME, or one of: {known}",
            )
        yield from file_texts(path, chat)


def _python_english() -> Iterator[str]:
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise CalibrationError(
            "this Python was installed without pydoc_data",
            fix="give a text file with --text FILE.txt",
        ) from error
    library = _docstrings(Path(sysconfig.get_paths()["stdlib"]))  # read as far as needed: parsing it all takes seconds
    for _, text in sorted(topics.topics.items()):  # interleaved, so that any prefix holds both kinds
        yield text
        yield from islice(library, MODULES_PER_TOPIC)
    yield from library


def _modules(root: Path) -> Iterator[Path]:
    """The standard library's sources, without its tests."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not ({"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts) or parts[0].startswith("_")):
            yield path


def _python_code(root: Path) -> Iterator[str]:
    """Modules of some length, of which what is longer than a dozen pages is left out: many authors, not a few."""
    for path in _modules(root):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) > 1000 and path.parent.name not in ("pydoc_data", "encodings"):
            yield text[:24_000]


def _docstrings(root: Path) -> Iterator[str]:
    """Docstrings of at least a paragraph, a text per module, from the standard library's sources."""
    for path in _modules(root):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        long = [text for text in texts if len(text) > 200]
        if long:
            yield "\n\n".join(long)


def _hub_texts(source: str, chat: Chat) -> Iterator[str]:
    _, name, *rest = source.split(":")
    config, split = [*rest, None, None][:2]
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            "reading a Hub dataset needs the datasets package", fix="pip install 'polysurgery[eval]'"
        ) from error
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in stream:
            text = text_of(row, source, chat)
            if text.strip():
                yield text
    except CalibrationError:
        raise
    except Exception as error:
        first = first_line(error)
        raise CalibrationError(
            f"the dataset could not be read: {first}", where=source, fix="check name and network"
        ) from error


def tokenised(source: str, tokenizer: Any, count: int) -> Iterator[array[int]]:
    """Documents of a text source as ids, see :func:`ids_of`."""
    return ids_of(documents(source, chat_of(tokenizer)), tokenizer, count)


def ids_of(texts: Iterable[str], tokenizer: Any, count: int) -> Iterator[array[int]]:
    """Texts as ids, each closed by the end-of-text token; `count` ids in all, or fewer.

    One after another, a long text in several parts, so that training texts of any length take no memory. In arrays of 4
    bytes an id: a list takes ten times as much.
    """
    if tokenizer is None:
        raise CalibrationError(
            "the model comes with no tokenizer, so text cannot be used",
            fix="give model inputs as a .safetensors file (pixel_values or input_ids)",
        )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    left = count
    for text in texts:
        for part in in_parts(StringIO(text)):
            last = not isinstance(part, Unfinished) and not isinstance(text, Unfinished)
            budget = left * CHARACTERS_PER_TOKEN * 4
            ids = list(tokenizer(part[:budget], add_special_tokens=False, verbose=False)["input_ids"])
            found = array("i", (ids + end if last else ids)[:left])
            yield found
            left -= len(found)
            if left <= 0:
                return


def chat_of(tokenizer: Any) -> Chat:
    """Writes chat messages in the tokenizer's template, as the model has seen them in training."""

    def written(messages: Messages) -> str:
        if getattr(tokenizer, "chat_template", None) is None:
            raise CalibrationError(
                "the text is chat messages, and the model's tokenizer has no chat template",
                fix='write them out as "text"',
            )
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    return written


def tokens_of(source: str, tokenizer: Any, count: int, skip: int = 0) -> Tensor:
    """Token ids skip … skip + count of a text source, document after document; shape (≤ count,)."""
    ids = [token for text in tokenised(source, tokenizer, skip + count) for token in text]
    return torch.tensor(ids[skip:], dtype=torch.long)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, as ids: a start token (Llama, Gemma), [CLS] and [SEP] (BERT).

    A model trained with a start token is another model without it, so every window gets the special tokens it knows.
    """
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start]), list(whole[start + len(bare) :])
    return [], []


def label(source: str) -> str:
    """A source's name in reports: of a file its last part."""
    return source if source in (AUTO, *BUILT_IN) or source.startswith("hub:") else Path(source).name


def check_source(source: str) -> None:
    """Raises RecipeError for a source that cannot be what was meant, before a model is loaded."""
    if source in (AUTO, *BUILT_IN) or source.startswith("hub:") or Path(source).expanduser().is_file():
        return
    raise RecipeError(
        f"no text source {source!r}{did_you_mean(source, BUILT_IN)}",
        cause="neither an existing file nor a built-in source",
        fix=f"one of {', '.join(BUILT_IN)}, hub:NAME, or a .txt, .jsonl or .safetensors file; in Python also token ids",
    )
