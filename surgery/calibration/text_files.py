"""Local text files → documents.

FILE.txt, FILE.md, …    plain text, one document, read in parts
FILE.jsonl              a JSON record a line: an object with "text" or with chat "messages", or a string
FILE.json               an array of such records, or lines of them

UTF-8, or UTF-16 with its byte order mark; gzipped where the name ends in .gz.
"""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from surgery.errors import CalibrationError, first_line

Messages = Sequence[Mapping[str, Any]]
Chat = Callable[[Messages], str]
"""Chat messages, each with a role and content, → text."""

LINES, ARRAYS = (".jsonl", ".ndjson"), (".json",)
KEYS_SHOWN = 8
TOGETHER = 1 << 20  # characters of a long text that are read and go through the tokenizer at once


class Unfinished(str):
    """Part of a document that goes on in the text after it."""


def plain_chat(messages: Messages) -> str:
    """What is said, without the roles: for readers that have no chat template."""
    return "\n\n".join(message["content"] for message in messages if isinstance(message.get("content"), str))


def in_parts(file: IO[str]) -> Iterator[str]:
    """A text of any length, cut at some line ends; all parts but the last are :class:`Unfinished`."""
    held = ""
    while True:
        held += file.read(TOGETHER + 1 - len(held))
        if len(held) <= TOGETHER:
            yield held
            return
        cut = held.rfind("\n", 0, TOGETHER) + 1 or TOGETHER
        yield Unfinished(held[:cut])
        held = held[cut:]


def file_texts(path: Path, chat: Chat = plain_chat) -> Iterator[str]:
    """The documents of a file, in order, long plain text in parts; blank ones left out.

    Args:
        chat: how messages become text.
    Raises:
        CalibrationError: no such encoding, not JSON, or a record of which it is not clear what its text is; with line.
    """
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        with _opened(path) as file:
            if kind in LINES:
                texts = _of_lines(file, path, chat)
            elif kind in ARRAYS:
                texts = _of_json(file, path, chat)
            else:
                texts = in_parts(file)
            goes_on = False
            for text in texts:
                if text.strip() or goes_on or isinstance(text, Unfinished):
                    yield text
                goes_on = isinstance(text, Unfinished)
    except UnicodeError as error:
        raise CalibrationError(
            f"the file cannot be read as UTF-8: {error}",
            where=str(path),
            cause="it has another encoding, or it is no text file",
            fix="save it as UTF-8 text or as JSON lines",
        ) from error
    except (OSError, EOFError) as error:
        raise CalibrationError(f"the file cannot be read: {error}", where=str(path)) from error


def text_of(record: Any, where: str, chat: Chat = plain_chat) -> str:
    """The text of a JSON record.

    Raises:
        CalibrationError: it has neither "text" nor "messages", or its messages do not fit the chat template.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise CalibrationError(f'a {type(record).__name__} without a "text" string', where=where)
    text, messages = record.get("text"), record.get("messages")
    if isinstance(text, str):
        return text
    if isinstance(messages, list) and messages and all(isinstance(part, dict) and "role" in part for part in messages):
        try:
            return chat(messages)
        except CalibrationError:
            raise
        except Exception as error:
            first = first_line(error)
            raise CalibrationError(f"the chat template refuses these messages: {first}", where=where) from error
    found = ", ".join(sorted(map(repr, record))[:KEYS_SHOWN]) or "nothing"
    raise CalibrationError(
        f'neither a "text" string nor a list of "messages" with roles, but {found}',
        where=where,
        fix='give each record a "text"',
    )


def _opened(path: Path) -> IO[str]:
    """The file as text. Lines end at line feeds and carriage returns alone, not at U+2028 or U+0085."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as raw:
        head = raw.read(4)
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not head.startswith(codecs.BOM_UTF32_LE)
    opened: IO[str] = opener(path, "rt", encoding="utf-16" if wide else "utf-8-sig")
    return opened


def _of_lines(lines: Iterable[str], path: Path, chat: Chat) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            yield text_of(_parsed(line, where), where, chat)


def _of_json(file: IO[str], path: Path, chat: Chat) -> Iterator[str]:
    """An array, one record, or lines of records, as many who write JSON lines name them .json."""
    content = file.read()
    try:
        whole = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        lines = content.split("\n")
        if not _is_json(lines[0]):
            raise _no_json(error, str(path)) from error
        yield from _of_lines(lines, path, chat)
        return
    records = whole if isinstance(whole, list) else [whole]
    for number, record in enumerate(records, 1):
        yield text_of(record, f"{path}, record {number}", chat)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _no_json(error, where) from error


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _no_json(error: Exception, where: str) -> CalibrationError:
    return CalibrationError(f"not JSON: {error}", where=where, fix='one JSON object a line, each with a "text"')
