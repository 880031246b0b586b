"""Running a sweep's cells as jobs of a Slurm cluster, through submitit (dependency group `slurm`)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbcd_cli.errors import RunError
from mbcd_cli.settings import Settings
from mbcd_cli.settings.sources import parse_value
from mbcd_cli.sweep.packing import units
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.run import Board, Command, begin, code_of, last_line, write_settings
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
    width: int | None = 0,
    jobs: int = 1,
    prepared: Mapping[str, Settings] | None = None,
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
        width, jobs, prepared: as `packing.units` reads them; a population is one job.
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
    together = units(cells, width=width, jobs=jobs, prepared=prepared or {})
    shares = list({together[cell.key][0].key: together[cell.key] for cell in wanted}.values())
    submitted: list[SubmittedJob] = []
    try:
        for at in range(0, len(shares), _ARRAY_JOBS):
            with executor.batch():
                for share in shares[at : at + _ARRAY_JOBS]:
                    submitted.append(executor.submit(Task(Command.of(share, threads=each, width=width))))
    except FailedJobError as error:
        why = str(error).strip().splitlines()[-1] if str(error).strip() else "sbatch failed"
        raise RunError(f"Slurm refuses the jobs: {why}", "Correct --slurm key=value, or ask for fewer runs.") from error
    pending = list(zip(shares, submitted, strict=True))
    while pending:
        for one in list(pending):
            share, job = one
            if job.done():
                pending.remove(one)
                for cell in share:
                    if cell in board.waiting:
                        board.waiting.remove(cell)
                        _settle(board, cell, job, packed=len(share) > 1)
        watch(board)
        if pending:
            time.sleep(poll)
    return board


def _settle(board: Board, cell: Cell, job: SubmittedJob, *, packed: bool) -> None:
    error = job.exception()
    code = None if error is not None else job.result()
    if packed and code is not None:
        code = code_of(cell, code)
    if state(cell.folder) == "done" and code in (DONE_CODE, BUSY_CODE, None):
        board.done.append(cell)
    elif code == BUSY_CODE:
        board.elsewhere.append(cell)
    elif error is not None:
        board.failed[cell.key] = str(error).strip().splitlines()[-1]
    else:
        board.failed[cell.key] = read_failure(cell.folder) or last_line(cell.folder)
