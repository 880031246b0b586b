"""Stand-ins for decoders that crash or never answer; imported by worker processes, so as little as can be."""

from __future__ import annotations

import os
import threading

import numpy as np

from mbcd_cli.data.media.decoding import Decoded


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
