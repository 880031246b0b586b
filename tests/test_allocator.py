"""What is asked of the C library's allocator."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from mbcd_cli.allocator import with_huge_pages

_HELD = """
import sys
import numpy as np
from mbcd_cli.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before = resident()
array = np.ones(2**23)
del array
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library")
@pytest.mark.parametrize(("how", "kept"), [("keep", True), ("plain", False)])
def test_freed_memory_stays_with_the_process(how, kept):
    done = subprocess.run([sys.executable, "-c", _HELD, how], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 2**25) is kept  # of 64 MB


def test_large_pages_are_asked_for_beside_what_is_set_already_and_not_twice():
    asked = with_huge_pages({"A": "1"})
    assert asked == {"A": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert with_huge_pages(asked) == asked
    told = {"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.hugetlb=0"}
    assert with_huge_pages(told) == told
