"""Files: written under a temporary name and renamed, and their fingerprints."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CAUSES = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose another place"),
    errno.EDQUOT: ("your quota on this disk is used up", "free some space, or choose another place"),
    errno.EROFS: ("the file system is read-only", "choose a place on another one, or mount it writable"),
    errno.EACCES: ("you have no permission to write there", "change the permissions, or choose another place"),
    errno.EPERM: ("you have no permission to write there", "change the permissions, or choose another place"),
    errno.EBUSY: ("something else uses it: a mount, or another program", "choose another place"),
    errno.EXDEV: ("it is on another file system", "choose another place"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EIO: ("the disk reports an error", "choose another disk"),
    errno.ESTALE: ("the network disk was lost on the way", "mount it again"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
}
"""What an operating system's error means to somebody who writes a file, and what they can do."""


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept, after the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "polysurgery" / name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder, which ends with this process at the latest.

    Raises:
        OSError: another process holds it, or there are no locks here.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


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


def not_written(error: OSError, what: str, where: Path) -> CheckpointError:
    """What to tell of an error on writing: its own cause, no guess."""
    cause, fix = CAUSES.get(error.errno or 0, ("", ""))
    reason = error.strerror or str(error)
    again = f"{fix}, then run the same command again" if fix else ""
    return CheckpointError(f"{what}: {reason}", where=str(where), cause=cause, fix=again)


def as_os_error(error: Exception) -> OSError:
    """The operating system's error that caused one of a library's own, as safetensors has it ("… (os error 28)")."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))


def cannot_write(folder: Path) -> OSError | None:
    """Why nothing can be put into a folder, as far as can be told without trying; None where something can."""
    if os.access(folder, os.W_OK | os.X_OK):
        return None
    number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
    return OSError(number, os.strerror(number), str(folder))


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
