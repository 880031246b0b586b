"""Running a sweep's cells as jobs of a Slurm cluster, through submitit (dependency group `slurm`)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mbcd_cli.errors import RunError
from mbcd_cli.settings.sources import parse_value
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.run import Board, begin, cell_command, environment, last_line, write_settings
from mbcd_cli.sweep.state import BUSY_CODE, DONE_CODE, read_failure, state

if TYPE_CHECKING:
    from submitit import Job as SubmittedJob
    from submitit.helpers import DelayedSubmission

_ARRAY_JOBS = 1000
"""Jobs of one array: Slurm takes no more than MaxArraySize (1001 unless a site says otherwise)."""
DEFAULTS: dict[str, object] = {"timeout_min": 720, "cpus_per_task": 4}
"""submitit parameters where `--slurm` says nothing."""


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


def parse_options(texts: Sequence[str]) -> dict[str, object]:
    """`key=value` submitit parameters (timeout_min, gpus_per_node, slurm_partition, slurm_array_parallelism, ...).

    Raises:
        RunError: not of that form.
    """
    options: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RunError(f"--slurm {text}: not an assignment.", "Write --slurm timeout_min=240.")
        options[key.strip()] = parse_value(value.strip())
    return options


def submit(
    cells: Sequence[Cell],
    *,
    options: Sequence[str],
    threads: int = 0,
    retry_failed: bool = False,
    watch: Callable[[Board], None] = lambda board: None,
    poll: float = 5.0,
) -> Board:
    """Submit all cells that are not done as array jobs, wait for them, and return how they ended.

    Leaving (Ctrl-C) leaves the jobs in the queue; the same command later finds what they have done, and the cells'
    locks keep a second job from one that runs.

    Args:
        options: `key=value` parameters of submitit; `cluster=local` runs the jobs as processes of this machine,
            `folder` is where submitit's own logs go (default: `submitit` beside the runs).
        threads: CPU threads of a job; 0 takes `cpus_per_task`.
        retry_failed: run failed cells again.
        watch: called every `poll` seconds.

    Raises:
        RunError: submitit is missing, refuses a parameter, there is no Slurm here, or it refuses the jobs.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError as error:
        raise RunError(
            "--launcher slurm needs submitit, which is not installed.", "Install it: uv sync --group slurm."
        ) from error
    asked = DEFAULTS | parse_options(options)
    board = begin(cells, retry_failed=retry_failed)
    wanted = list(board.waiting)
    watch(board)
    if not wanted:
        return board
    folder = asked.pop("folder", None) or wanted[0].folder.parent / "submitit"
    cluster = asked.pop("cluster", None)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        if executor.cluster == "local" and cluster != "local":
            raise RunError("There is no Slurm here (no srun).", "Use --launcher local, or --slurm cluster=local.")
        executor.update_parameters(**asked)
    except (NameError, TypeError, ValueError) as error:
        raise RunError(f"submitit refuses: {error}", "Correct --slurm key=value.") from error
    each = threads or int(asked["cpus_per_task"])
    for cell in wanted:
        write_settings(cell)
    jobs: list[SubmittedJob] = []
    try:
        for at in range(0, len(wanted), _ARRAY_JOBS):
            with executor.batch():
                for cell in wanted[at : at + _ARRAY_JOBS]:
                    command = tuple(cell_command(cell, threads=each))
                    jobs.append(executor.submit(Task(os.fspath(cell.folder.absolute()), command, each)))
    except FailedJobError as error:
        why = str(error).strip().splitlines()[-1] if str(error).strip() else "sbatch failed"
        raise RunError(f"Slurm refuses the jobs: {why}", "Correct --slurm key=value, or ask for fewer runs.") from error
    pending = dict(zip((cell.key for cell in wanted), zip(wanted, jobs, strict=True), strict=True))
    while pending:
        for key, (cell, job) in list(pending.items()):
            if job.done():
                del pending[key]
                board.waiting.remove(cell)
                _settle(board, cell, job)
        watch(board)
        if pending:
            time.sleep(poll)
    return board


def _settle(board: Board, cell: Cell, job: SubmittedJob) -> None:
    error = job.exception()
    code = None if error is not None else job.result()
    if state(cell.folder) == "done" and code in (DONE_CODE, BUSY_CODE, None):
        board.done.append(cell)
    elif code == BUSY_CODE:
        board.elsewhere.append(cell)
    elif error is not None:
        board.failed[cell.key] = str(error).strip().splitlines()[-1]
    else:
        board.failed[cell.key] = read_failure(cell.folder) or last_line(cell.folder)
