"""SIGKILL of a command, its workers and helpers at random instants (pytest -m stress tests/stress/test_kills.py -sn0).

Killed itself, a command leaves nothing behind after ten seconds, and once more ends in the same files. Killed at its
workers or helpers it goes on, and ends in the same files at once. INSTANTS=20 tries twenty instants instead of a
hundred, SEED=1 others. It needs a C compiler and Linux.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress

import campaign
import pytest

pytestmark = [
    pytest.mark.stress,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not campaign.COMPILER, reason="there is no C compiler"),
]


def victims(pid: int, kind: str) -> list[int]:
    """The processes of one kind that a command has now."""
    if kind == "parent":
        return [pid]
    below = campaign.children(pid)
    helpers = {one: campaign.command_line(one) for one in below}
    if kind == "cell":
        owners = [one for one, line in helpers.items() if "multiprocessing" not in line]
        return [one for owner in owners for one in (owner, *campaign.children(owner))]
    if kind == "tracker":
        return [one for one, line in helpers.items() if "resource_tracker" in line]
    servers = [one for one, line in helpers.items() if "forkserver" in line]
    return servers if kind == "fork server" else [one for server in servers for one in campaign.children(server)]


def kill(pid: int, kind: str, after: float, rng: random.Random) -> bool:
    """Kill a process of a kind, `after` seconds from now or when there is one; whether there was."""
    time.sleep(after)
    while not campaign.ended(pid):
        if found := victims(pid, kind):
            with suppress(ProcessLookupError):
                os.kill(rng.choice(found), signal.SIGKILL)
                return True
        time.sleep(0.002)
    return False


KINDS = [
    *(
        (f"{command} with workers", kind)
        for command in ("prepare", "train")
        for kind in ("parent", "worker", "fork server", "tracker")
    ),
    *((command, "parent") for command in ("prepare", "train", "evaluate", "landscape", "sweep", "sweep of packs")),
    *((command, "cell") for command in ("sweep", "sweep of packs")),
]


@pytest.mark.parametrize(("command", "kind"), KINDS)
def test_killed_at_any_instant(server, home, tmp_path, command, kind):
    rng = random.Random(int(os.environ.get("SEED", "0")))
    out = tmp_path / "out"
    for _ in range(2):  # the first brings imports
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        begun = time.monotonic()
        told = server.run(campaign.words_of(command, home, out), out)
        longest = time.monotonic() - begun
        assert told["code"] == 0, told
    expected, counts, wrong = campaign.contents(out), Counter(), []
    instants = int(os.environ.get("INSTANTS", "100"))
    while sum(counts.values()) < instants:
        shutil.rmtree(out)
        out.mkdir()
        after, begun = rng.uniform(0, longest), time.monotonic()
        pid = server.begin(campaign.words_of(command, home, out), out)
        killed = kill(pid, kind, after, rng)
        struck = again = server.end()
        if not killed or (kind == "parent" and struck["code"] == 0):  # it had just ended
            longest = (longest + time.monotonic() - begun) / 2  # others use the machine more, or less
            continue
        counts[f"exit code {struck['code']}"] += 1
        if sum(counts.values()) % 25 == 0:
            print(f"{command}, {kind}: {dict(counts)}", flush=True)
        try:
            assert "Unexpected" not in struck["said"]
            assert "Traceback" not in struck["said"]
            assert struck["code"] == -signal.SIGKILL if kind == "parent" else struck["code"] in (0, 1)
            assert not struck["left"]
            if struck["code"]:
                again = server.run(campaign.words_of(command, home, out), out)
            campaign.check_ended(command, again, out, expected)
        except AssertionError as error:
            wrong.append(f"{command}, {kind} killed after {after:.2f} s: {error}\nfirst {struck}\nthen {again}")
            print(wrong[-1], flush=True)
    print(f"{command}, {kind}: {dict(counts)}, {longest:.1f} s", flush=True)
    assert not wrong
