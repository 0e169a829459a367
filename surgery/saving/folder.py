"""The folder of a checkpoint: written under a temporary name, renamed when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import CheckpointError

REPORT = "surgery.json"


def check_target(out: Path, overwrite: bool) -> Path:
    """`out` from the root. Raises CheckpointError unless it may be written: absent, empty, or an earlier twin to be
    overwritten."""
    out = Path(os.path.abspath(out))  # "." has no name to put others beside
    blocking = next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        raise CheckpointError(
            "a file stands in the way of the output folder", where=str(blocking), fix="choose another -o"
        )
    if not out.exists():
        return out
    if not out.is_dir():
        raise CheckpointError("the output exists and is not a folder", where=str(out), fix="choose another -o")
    if not any(out.iterdir()):
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


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the body ends well, and is removed when it does not.

    Raises:
        CheckpointError: not writable, or the disk is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors keeps its files to their owner
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint could not be written: {error.strerror or error}",
            where=str(out),
            cause="the disk is full, or the folder is not writable",
            fix="free some space or choose another -o, then run the same command: finished blocks are kept",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
