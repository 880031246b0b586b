"""What a Ray task does on its node, in a process of Ray's that serves many tasks; it imports little."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from mbcd_cli.launch.nodes import Demands
from mbcd_cli.launch.unit import STOPPED_CODE, Order
from mbcd_cli.launch.worker import Worker

_WORKERS: dict[tuple[int, str | None], Worker] = {}
"""The warm process that stays from task to task, by threads and visible GPUs."""
_FAULTS: dict[Demands, str] = {}
"""What this node lacks, looked for once."""


def fault(demands: Demands) -> str:
    """What this node lacks, in words; empty: nothing."""
    return _FAULTS.setdefault(demands, demands.fault())


def run_unit(order: Order, threads: int, demands: Demands, leave: str) -> int | tuple[str, str, str]:
    """Run a unit to its end, or, once the file `leave` is there, to its checkpoint.

    Returns:
        Exit code of its process, or (the node, its name, what it lacks).

    Raises:
        KeyboardInterrupt: the command ends; the unit's checkpoint is written.
    """
    import ray

    if lacking := fault(demands):
        return ray.get_runtime_context().get_node_id(), socket.gethostname(), lacking
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
        return code
    except KeyboardInterrupt:
        worker.terminate()
        worker.close()
        raise
