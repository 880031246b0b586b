"""What `keep_freed_memory` asks of the C library."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

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
