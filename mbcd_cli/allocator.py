"""The C library's allocator, for processes that allocate the same large arrays again and again."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Have the C library keep what tensors free instead of returning it to the system; where it is not glibc, nothing.

    Every training step and every decoded clip frees and allocates the same megabytes; handing them back and forth, page
    by page, took 4 to 8 % of a step on the CPU (docs/performance.md). The process holds its peak until it ends.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_TOP_PAD, 2**26)
