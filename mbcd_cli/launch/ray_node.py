"""What a Ray task does on its node, in a process of Ray's that serves many tasks; it imports little."""

from __future__ import annotations

import os
from pathlib import Path

from mbcd_cli.launch.nodes import Demands
from mbcd_cli.launch.unit import BUSY_CODE, DONE_CODE, STOPPED_CODE, Order
from mbcd_cli.launch.worker import Worker

_WORKERS: dict[tuple[int, str | None], Worker] = {}
"""The warm process that stays from task to task, by threads and visible GPUs."""
_FAULTS: dict[Demands, str] = {}
"""What this node lacks."""


def fault(demands: Demands) -> str:
    """What this node lacks, in words, looked for once; empty: nothing."""
    return _FAULTS[demands] if demands in _FAULTS else _look(demands)


def _look(demands: Demands) -> str:
    _FAULTS[demands] = demands.fault()
    return _FAULTS[demands]


def run_unit(demands: Demands, order: Order, threads: int, leave: str) -> int | str:
    """Run a unit to its end, or, once the file `leave` is there, to its checkpoint.

    Returns:
        Exit code of its process, or, where it failed, what this node has come to lack, in words.

    Raises:
        KeyboardInterrupt: the command ends; the unit's checkpoint is written.
    """
    if Path(leave).exists():
        return STOPPED_CODE
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    worker = _WORKERS.setdefault((threads, gpus), Worker(threads=threads, gpu=gpus))
    try:
        worker.begin(order)
        # Ray's interrupt is noticed between two lines of Python only, and where workers ignore it not at all.
        while (code := worker.poll(1.0)) is None:
            if Path(leave).exists():
                worker.terminate()
    except KeyboardInterrupt:
        worker.terminate()
        worker.close()
        raise
    except OSError:  # its log cannot be written, to begin with
        if not (lacking := _look(demands)):
            raise
        return lacking
    # A disk fills, a folder is gone: what failed there is no failure of the unit.
    return code if code in (DONE_CODE, BUSY_CODE, STOPPED_CODE) else _look(demands) or code
