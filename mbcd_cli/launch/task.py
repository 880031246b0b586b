"""What a job of Slurm does: submitit pickles it and calls it on the node, where this module is imported."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbcd_cli.launch.nodes import Demands
from mbcd_cli.launch.unit import STOPPED_CODE, Order
from mbcd_cli.launch.worker import PATIENCE, Worker

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

STOPPED_CODES = (STOPPED_CODE, -signal.SIGTERM)
"""Exit codes of a unit that Slurm had stop (`scancel`, a preemption's grace time, a node that is shut down)."""


@dataclass(slots=True)
class Task:
    """Run units one after the other in one warm process; before the time limit or a preemption have the running one
    write its checkpoint.

    Attributes:
        orders: what is to be done. threads: of each. demands: that the node has to meet.
    """

    orders: tuple[Order, ...]
    threads: int
    demands: Demands
    worker: Worker | None = None
    at: int = 0

    def __call__(self) -> dict[str, int] | str:
        """Log -> exit code of the orders that were begun; or what the node lacks."""
        if fault := self.demands.fault():
            return f"node {os.environ.get('SLURMD_NODENAME') or socket.gethostname()} {fault}"
        self.worker = Worker(threads=self.threads)
        codes = {}
        for at, order in enumerate(self.orders):
            self.at = at
            codes[order.log] = self.worker.run(order)
            if codes[order.log] in STOPPED_CODES:
                break
        self.worker.close()
        return codes

    def checkpoint(self) -> DelayedSubmission:
        """submitit calls this when Slurm is about to end the job; the job it returns goes on from the checkpoints."""
        import submitit

        if self.worker is not None:
            self.worker.terminate()
            self.worker.close(PATIENCE)
        return submitit.helpers.DelayedSubmission(Task(self.orders[self.at :], self.threads, self.demands))
