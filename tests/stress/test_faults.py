"""A fault at every single call that changes the disk (pytest -m stress tests/stress/test_faults.py -sn0).

The n-th write, rename, sync, truncation, deletion or new folder fails (the disk full, broken or read-only), or the
process is killed there; once more, the same command leaves the same files, and nothing that was half written.
EVERY_NTH=10 tries every tenth call, FROM=3 begins with the third, TO=9 ends with the ninth. It needs a C compiler.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import campaign
import pytest

pytestmark = [
    pytest.mark.stress,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not campaign.COMPILER, reason="there is no C compiler"),
]
FAULTS = {"ENOSPC": 28, "EIO": 5, "EROFS": 30, "SIGKILL": -1}


def state(out: Path) -> str:
    """What the folder holds, but what is half written under a name of its own, and what tells the time."""
    told = {name: value for name, value in campaign.contents(out).items() if not name.endswith(".partial")}
    return hashlib.sha256(repr(told).encode()).hexdigest()


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "landscape", "sweep of one", "sweep of packs"])
def test_the_same_command_once_more_leaves_the_same_files(server, home, tmp_path, command):
    """What one state of the folder becomes is tried once, however many faults lead to it."""
    out = tmp_path / "out"
    out.mkdir()
    told = server.run(campaign.words_of(command, home, out), out)
    assert told["code"] == 0, told
    expected, counts, states, wrong = campaign.contents(out), Counter(), set(), []
    every, first = int(os.environ.get("EVERY_NTH", "1")), int(os.environ.get("FROM", "1"))
    last = min(told["calls"], int(os.environ.get("TO", told["calls"])))
    for number in range(first, last + 1, every):
        if number % 25 == 0:
            print(f"{command}: call {number}, {dict(counts)}, {len(states)} different states", flush=True)
        for name, fault in FAULTS.items():
            shutil.rmtree(out)
            out.mkdir()
            struck = again = server.run(campaign.words_of(command, home, out), out, number, fault)
            counts[f"{name} {'told' if struck['code'] else 'survived'}"] += 1
            partial = [path.name for path in out.rglob("*.partial")]
            now = state(out)
            try:
                assert "Unexpected" not in struck["said"]
                assert "Traceback" not in struck["said"]
                assert struck["code"] in ((-signal.SIGKILL, 0) if fault < 0 else (0, 1, 3))
                assert name not in ("ENOSPC", "EIO") or struck["struck"].startswith(("unlink", "rmdir")) or not partial
                assert not struck["left"]
                if now not in states:
                    again = server.run(campaign.words_of(command, home, out), out)
                    campaign.check_ended(command, again, out, expected)
                    states.add(now)
            except AssertionError as error:
                wrong.append(f"{command}, {name} at call {number}: {error}\nfirst {struck}\nthen {again}")
                print(wrong[-1], flush=True)
    print(f"{command}: {told['calls']} calls, {dict(counts)}, {len(states)} different states", flush=True)
    assert not wrong
