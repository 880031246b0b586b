"""Its being here puts this folder on the import path: `from helpers import ...` works in every test.

So do the cases of the rooms that others' tests use.
"""

import signal
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent / room) for room in ("data", "training")]
# A shell's background jobs ignore Ctrl-C, and so would every process that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
