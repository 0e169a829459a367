"""Texts of one file of a Hub dataset at one commit: `hub:OWNER/NAME@COMMIT/FILE`, JSON lines, gzipped or plain.

Only as much of the file is fetched as is read, in pieces that are kept in the Hub's cache folder: the head of a file
of gigabytes costs a few hundred kilobytes, once.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from surgery.calibration.text_files import Chat, plain_chat, text_of
from surgery.errors import CalibrationError, first_line
from surgery.runtime.files import replacing

PIECE = 512 * 1024  # bytes of a file as it is stored, fetched and kept at once
TIMEOUT = 10.0  # seconds without a response
LONGEST = 20_000  # characters of one document: a mixture of many texts, not of a few long ones
NAME = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})/(?P<file>[^:]+\.jsonl?(?:\.gz)?)")


def is_hub_file(source: str) -> bool:
    """Whether a source names a file of a dataset at a commit."""
    return NAME.fullmatch(source) is not None


def hub_file_texts(source: str, chat: Chat = plain_chat) -> Iterator[str]:
    """The text of every line, in order, cut at LONGEST characters; fetched as they are asked for.

    Raises:
        CalibrationError: the file cannot be reached, or holds something else.
    """
    for number, line in enumerate(_lines(source), 1):
        try:
            record = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CalibrationError(f"line {number} is not JSON: {error}", where=source) from error
        text = text_of(record, f"{source}:{number}", chat)
        if text.strip():
            yield text[:LONGEST]


def problem(source: str) -> str:
    """Why the beginning of a file cannot be fetched; nothing where it can, and then it is in the cache."""
    try:
        next(_pieces(source), None)
    except CalibrationError as error:
        return error.what
    return ""


def _lines(source: str) -> Iterator[bytes]:
    unpacked = _Gunzip() if source.endswith(".gz") else bytes
    rest = b""
    for piece in _pieces(source):
        try:
            text = unpacked(piece)
        except zlib.error as error:
            raise CalibrationError(f"the file is not what its name says: {error}", where=source) from error
        *lines, rest = (rest + text).split(b"\n")
        yield from (line for line in lines if line.strip())
    if rest.strip():
        yield rest


class _Gunzip:
    """Unpacks a gzip file piece by piece; such a file may have several members, one after another."""

    def __init__(self) -> None:
        self.member = zlib.decompressobj(zlib.MAX_WBITS | 16)

    def __call__(self, piece: bytes) -> bytes:
        texts = []
        while piece:
            if self.member.eof:
                self.member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            texts.append(self.member.decompress(piece))
            piece = self.member.unused_data
        return b"".join(texts)


def _pieces(source: str) -> Iterator[bytes]:
    """The stored file from its beginning, piece by piece, each from the cache or else fetched into it."""
    folder = cache_of(source)
    for number in range(1 << 30):
        file = folder / f"{number:06d}"
        if not file.is_file():
            content = _fetched(source, number * PIECE)
            with replacing(file, several=True) as temporary:
                temporary.write_bytes(content)
        content = file.read_bytes()
        if content:
            yield content
        if len(content) < PIECE:
            return


def cache_of(source: str) -> Path:
    """Where the pieces of a file are kept."""
    from huggingface_hub import constants

    found = NAME.fullmatch(source)
    assert found is not None
    inside = "--".join((found["repo"], found["commit"][:12], found["file"])).replace("/", "--")
    return Path(constants.HF_HUB_CACHE).parent / "polysurgery" / inside


def _fetched(source: str, start: int) -> bytes:
    """PIECE bytes from `start` on; fewer at the end of the file."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    found = NAME.fullmatch(source)
    assert found is not None
    if constants.HF_HUB_OFFLINE:
        raise _unreachable(source, "the Hub is switched off (HF_HUB_OFFLINE)")
    url = hf_hub_url(found["repo"], found["file"], repo_type="dataset", revision=found["commit"])
    wanted = {**build_hf_headers(), "Range": f"bytes={start}-{start + PIECE - 1}"}
    try:
        with get_session().stream("GET", url, headers=wanted, timeout=TIMEOUT, follow_redirects=True) as response:
            if response.status_code == 416:  # the file ended with the piece before
                return b""
            hf_raise_for_status(response)
            skipped = 0 if response.status_code == 206 else start  # a server that does not know of ranges
            return _some(response.iter_raw(), skipped)
    except Exception as error:
        first = first_line(error)
        raise _unreachable(source, first) from error


def _some(stream: Iterable[bytes], skipped: int) -> bytes:
    """PIECE bytes of a stream after so many skipped; fewer at its end."""
    content = bytearray()
    for part in stream:
        content += part
        if len(content) >= skipped + PIECE:
            break
    return bytes(content[skipped : skipped + PIECE])


def _unreachable(source: str, why: str) -> CalibrationError:
    return CalibrationError(
        f"the file could not be fetched: {why}",
        where=source,
        cause="no network, or the Hub has no such file",
        fix="--text samples needs no network; a text file of many kinds does better",
    )
