"""The C library's allocator, for processes that allocate the same large arrays again and again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb="


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


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment whose process asks the kernel for pages of 2 MB; where the C library is not glibc 2.35, as it was.

    A population walks through hundreds of megabytes of weights and moments in every step: 47 against 60 ms for 32
    members of ERM on vectors (docs/performance.md). It cannot be asked for after the start.
    """
    tunables = [one for one in environment.get(_TUNABLES, "").split(":") if one]
    if not any(one.startswith(_HUGE_PAGES) for one in tunables):
        tunables.append(f"{_HUGE_PAGES}1")
    return {**environment, _TUNABLES: ":".join(tunables)}
