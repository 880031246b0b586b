"""What begins the process of cells, here or as the job of a cluster; that imports this module, so it imports little."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mbcd_cli.allocator import with_huge_pages
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


@dataclass(frozen=True, slots=True)
class Command:
    """What begins the process of a cell, or of a population.

    Attributes:
        line: its command line. folders: run folders that it is told on standard input, where they are several.
        threads: CPU threads that it may use. log: where what it says goes.
    """

    line: tuple[str, ...]
    folders: tuple[str, ...]
    threads: int
    log: str

    def begin(self, *, gpu: str | None = None) -> subprocess.Popen:
        """Begin, or go on with what is begun, on one GPU at most."""
        variables = environment(threads=self.threads, gpu=gpu)
        with Path(self.log).open("ab") as log:
            process = subprocess.Popen(
                self.line,
                stdin=subprocess.PIPE,  # held open to the end: a process whose sweep is killed ends too
                stdout=log,
                stderr=subprocess.STDOUT,
                env=with_huge_pages(variables) if self.folders else variables,
                # Ctrl-C reaches the sweep alone, which then asks its processes to write their checkpoints.
                start_new_session=True,
            )
        if self.folders:
            with suppress(BrokenPipeError):
                process.stdin.write("".join(f"{folder}\n" for folder in self.folders).encode() + b"\n")
                process.stdin.flush()
        return process


@dataclass(slots=True)
class Task:
    """What a job does: run the process of a cell or a population; before the time limit or a preemption have it write
    its checkpoints.

    submitit pickles it; called on the node it returns the exit code of the process.
    """

    command: Command
    process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Run the cells to their end."""
        self.process = self.command.begin()
        return self.process.wait()

    def checkpoint(self) -> DelayedSubmission:
        """submitit calls this when Slurm is about to end the job; the job it returns goes on from the checkpoints."""
        import submitit

        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        return submitit.helpers.DelayedSubmission(Task(self.command))
