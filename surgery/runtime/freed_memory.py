"""What the C library does with memory that is given back to it.

A training step on a CPU takes and gives back the same gigabytes every time. glibc maps each large piece anew, and the
system fills it with zeros page by page: a fifth of a step's time (docs/log.md, 2026-11-29). What a process keeps it
uses again.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees, for itself to use again. False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(option, value) == 1 for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))
