"""Its being here puts this folder on the import path: `from helpers import ...` works in every test.

So do the cases of the rooms that others' tests use.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent / room) for room in ("data", "encoders", "methods", "training")]
# Two processes of tests share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background jobs ignore Ctrl-C, and so would every process that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """Media, their cache, a finished and evaluated run, a landscape (`commands.make_home`)."""
    from commands import make_home

    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def kept(home):
    """The folders of `home` as they are, brought back afterwards."""
    from damage import Snapshot

    snapshots = {name: Snapshot.of(home / name) for name in ("cache", "run", "landscape", "tiny")}
    yield snapshots
    for snapshot in snapshots.values():
        snapshot.restore()
