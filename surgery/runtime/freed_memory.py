"""What the C library does with memory that is given back to it: glibc is told, no other is asked.

The last call holds for the process, so that an offloaded conversion after a refinement does not keep what it frees.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Freed memory stays with the process, for itself to use again.

    A training step on a CPU takes and frees the same gigabytes every time, and so do logits that are measured. glibc
    maps each large piece anew, and the system fills it with zeros page by page: a fifth of a step's time (docs/log.md,
    2026-11-29), a tenth of a measurement's. It is for commands, whose process is theirs.
    """
    _tell({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def give_memory_back() -> None:
    """Freed matrices are returned at once, instead of those of up to 32 MB being kept for later: with weights read and
    let go of all the time, what is kept grows with the number of layers."""
    _tell({M_MMAP_MAX: 1 << 16, M_MMAP_THRESHOLD: 1 << 20, M_TRIM_THRESHOLD: 1 << 20})


def _tell(options: dict[int, int]) -> None:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for option, value in options.items():
            library.mallopt(option, value)
