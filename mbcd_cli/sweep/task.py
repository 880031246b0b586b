"""What a job of a cluster does: a cell's process. Every job imports this module, so it imports little."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mbcd_cli.place import LAUNCH_VARIABLES
from mbcd_cli.settings.sources import ENV_PREFIX

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


def environment(*, threads: int, gpu: str | None) -> dict[str, str]:
    """The environment of a cell's process: settled settings, alone in its training, and one GPU at most."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.upper().startswith(ENV_PREFIX) and key not in LAUNCH_VARIABLES
    }
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return inherited | own | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})


@dataclass(slots=True)
class Task:
    """What a job does: run a cell's process; before the time limit or a preemption have it write its checkpoint.

    submitit pickles it; called on the node it returns the exit code of the cell's process.
    """

    folder: str
    line: tuple[str, ...]
    threads: int
    process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Run the cell to its end."""
        with Path(f"{self.folder}.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(threads=self.threads, gpu=None),
            )
            return self.process.wait()

    def checkpoint(self) -> DelayedSubmission:
        """submitit calls this when Slurm is about to end the job; the job it returns goes on from the checkpoint."""
        import submitit

        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        return submitit.helpers.DelayedSubmission(Task(self.folder, self.line, self.threads))
