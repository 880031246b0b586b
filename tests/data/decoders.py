"""Stand-ins for decoders that crash or never answer; imported by worker processes, so as little as can be."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np

from mbcd_cli.data.media.timeline import Deadline
from mbcd_cli.data.records import Decoded


def crash(index, clip, views, job):
    """Kills its process on clips c2 and c5."""
    if clip.id in ("c2", "c5"):
        os._exit(1)
    return Decoded(index, views, [(np.full(3, index, np.float32),)])


def stall(index, clip, views, job):
    """Never answers on clip c1."""
    if clip.id == "c1":
        threading.Event().wait()
    return Decoded(index, views, [(np.full(3, index, np.float32),)])


def granted(index, clip, views, job):
    """On clip c1 says what its own deadline allows, and waits until it may go on."""
    if clip.id == "c1":
        Deadline(Path(__file__), pixels=10**7)
        while not Path(f"{clip.media['m'].path}.go").exists():
            time.sleep(0.001)
    return Decoded(index, views, [(np.full(3, index, np.float32),)])


def large(index, clip, views, job):
    """More than a pipe holds; says beforehand, in a file named like the clip's, that it is about to be sent."""
    parts = [(np.full(1 << 20, index, np.float32),)]
    Path(f"{clip.media['m'].path}.sent").touch()
    return Decoded(index, views, parts)


def no_worker(connection):
    """Ends before it begins."""
    os._exit(1)


def once(index, clip, views, job):
    """On clip c2 waits until it may go on, and the first time kills its process."""
    beside = Path(str(clip.media["m"].path))
    if clip.id == "c2":
        while not beside.with_suffix(".go").exists():
            time.sleep(0.001)
        if not beside.with_suffix(".done").exists():
            beside.with_suffix(".done").touch()
            os._exit(1)
    return Decoded(index, views, [(np.full(3, index, np.float32),)])
