"""The owner's side of a warm process, here or on a node of a cluster, which imports this module: it imports little."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from mbcd_cli.allocator import with_huge_pages
from mbcd_cli.launch.unit import Order
from mbcd_cli.place import LAUNCH_VARIABLES
from mbcd_cli.settings.sources import ENV_PREFIX

PATIENCE = 60.0
"""Seconds that a process which is stopped has for its last checkpoint."""


def environment(*, threads: int, gpu: str | None) -> dict[str, str]:
    """The environment of a unit's process: settled settings, alone in its training, and one GPU at most."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.upper().startswith(ENV_PREFIX) and key not in LAUNCH_VARIABLES
    }
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return inherited | own | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})


class Worker:
    """Runs orders one after the other, each in a child that a process forks which has imported everything once.

    Args:
        threads: CPU threads of a child. gpu: that it sees; None leaves the choice to it.
    """

    def __init__(self, *, threads: int, gpu: str | None = None) -> None:
        self.threads, self.gpu = threads, gpu
        self.process: subprocess.Popen | None = None
        self._large = False

    def begin(self, order: Order) -> None:
        """Begin, or go on with what is begun. The one before has to have ended."""
        if self.process is not None and (self.process.poll() is not None or self._large != order.large):
            self.close()
        if self.process is None:
            self.process, self._large = self._start(order), order.large
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            self.process.stdin.flush()

    def _start(self, order: Order) -> subprocess.Popen:
        variables = environment(threads=self.threads, gpu=self.gpu)
        with Path(order.log).open("ab") as log:
            return subprocess.Popen(
                (sys.executable, "-m", "mbcd_cli.launch.warm"),
                stdin=subprocess.PIPE,  # held open to the end: a process whose owner is killed ends too
                stdout=subprocess.PIPE,
                stderr=log,
                env=with_huge_pages(variables) if order.large else variables,
                # Ctrl-C reaches the owner alone, which then asks its processes to write their checkpoints.
                start_new_session=True,
            )

    def poll(self, timeout: float | None = 0) -> int | None:
        """How the order ended: its exit code, or minus the signal that killed it; None where it has not, in time."""
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready:
            return None
        line = self.process.stdout.readline()
        if line:
            return int(line)
        code = self.process.wait()  # it was killed itself, or could not begin
        self.close()
        return code

    def run(self, order: Order) -> int:
        """Begin, and wait for the end."""
        self.begin(order)
        return self.poll(None)

    def terminate(self) -> None:
        """Ask for a checkpoint and the end."""
        if self.process is not None:
            self.process.terminate()

    def close(self, patience: float = PATIENCE) -> None:
        """Wait for the end after `terminate`, or of a process that has nothing to do; kill it if it takes long."""
        if self.process is None:
            return
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=max(patience, 0.1))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.process = None
