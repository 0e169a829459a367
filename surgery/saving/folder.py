"""The folder of a checkpoint: written under a temporary name, moved to its own when it is whole.

The temporary folder is beside the output, so that a rename finishes it. Where the output is a mount point, or lies in a
folder that may not be written to, it is inside the output, whose files are then moved one by one, the report last.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from surgery.errors import CheckpointError
from surgery.runtime.files import cannot_write, locked, not_written

REPORT = "surgery.json"
OURS = ".surgery"  # what we put inside an output begins so
NO_CONTENT = "lost+found"  # on the root of a file system


def check_target(out: Path, overwrite: bool) -> Path:
    """`out` from the root, links followed. Touches nothing.

    Raises:
        CheckpointError: it may not be written: it is neither absent, empty nor an earlier twin to be overwritten; or
            it cannot be: a folder that is not ours to write to, a file system that is read-only.
    """
    out = Path(os.path.realpath(out))  # "." has no name to put others beside
    blocking = next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        raise CheckpointError(
            "a file blocks the path of the output folder", where=str(blocking), fix="choose another -o"
        )
    if out.exists() and not out.is_dir():
        raise CheckpointError("the output exists and is not a folder", where=str(out), fix="choose another -o")
    place = _staged_in(out)
    problem = cannot_write(place)
    if problem is not None:
        raise not_written(problem, "the output folder could not be written", place)
    if not out.exists() or not _content(out):
        return out
    if not (out / REPORT).is_file():
        raise CheckpointError(
            "the output folder exists and was not made by this tool",
            where=str(out),
            cause=f"it holds files but no {REPORT}",
            fix="choose another -o; nothing in it was touched",
        )
    if not overwrite:
        raise CheckpointError(
            "the output folder already holds a twin", where=str(out), fix="choose another -o, or give --overwrite"
        )
    return out


def check_room(out: Path, model: nn.Module, dtype: str) -> None:
    """Raises CheckpointError where a model's weights do not fit on the output's disk; said before any work is done."""
    place = _existing(out)
    free = shutil.disk_usage(place).free
    needed = sum(value.numel() for value in model.parameters()) * getattr(torch, dtype).itemsize
    if free < needed:
        raise CheckpointError(
            f"the twin's weights take {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free",
            where=str(place),
            fix="free some space, or choose an output (-o) on another disk",
        )


def kept_beside(out: Path, suffix: str) -> Path:
    """Where unfinished work on `out` is kept: `OUT.suffix`, or inside `out` where nothing may stand beside it."""
    return out / f"{OURS}.{suffix}" if _alone(out) else out.with_name(f"{out.name}.{suffix}")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder whose content becomes `out`'s when the body ends well, and is removed when it does not.

    What a killed run left under such a name is removed.

    Raises:
        CheckpointError: it could not be written, and why.
    """
    temporary, lock = None, ExitStack()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        parent, prefix = (out, f"{OURS}.") if _alone(out) else (out.parent, f".{out.name}.")
        _remove_leftovers(parent, prefix)
        temporary = _made(parent, prefix)
        with suppress(OSError):  # a file system without locks
            lock.enter_context(locked(temporary))
        yield temporary
        _open_to_all(temporary)
        _put(temporary, out)
    except OSError as error:
        raise not_written(error, "the checkpoint could not be written", out) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        lock.close()


def _alone(out: Path) -> bool:
    """Whether nothing can be renamed to `out`, or stand beside it."""
    return out.is_dir() and (os.path.ismount(out) or cannot_write(out.parent) is not None)


def _staged_in(out: Path) -> Path:
    """The folder that is to be written to first, which exists."""
    return out if _alone(out) else _existing(out.parent)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _content(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if not file.name.startswith(OURS) and file.name != NO_CONTENT]


def _made(parent: Path, prefix: str) -> Path:
    """A new folder, with the permissions that the user gives new folders."""
    folder = parent / f"{prefix}{secrets.token_hex(4)}.tmp"
    folder.mkdir()
    return folder


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Temporary folders of this output whose process is gone."""
    for folder in parent.iterdir():
        if folder.name.startswith(prefix) and folder.suffix == ".tmp" and folder.is_dir():
            with suppress(OSError), locked(folder):  # refused while its process lives
                shutil.rmtree(folder, ignore_errors=True)


def _open_to_all(folder: Path) -> None:
    """Files as open as the folder is: safetensors keeps its files to their owner."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _put(made: Path, out: Path) -> None:
    """`made` in the place of `out`: in one step, or, where `out` cannot be renamed, file by file."""
    if made.parent != out:
        old = made.with_name(made.name + ".old")
        try:
            if out.exists():
                os.rename(out, old)
        except OSError:
            pass  # a mount point of the same file system; nothing has happened yet
        else:
            try:
                os.rename(made, out)
            except OSError:
                if old.exists():
                    os.rename(old, out)
                raise
            shutil.rmtree(old, ignore_errors=True)
            return
    for file in _content(out):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    for file in sorted(made.iterdir(), key=lambda file: file.name == REPORT):
        shutil.move(file, out / file.name)
