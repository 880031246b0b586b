"""Running a sweep's cells as jobs of a Slurm cluster, through submitit (dependency group `slurm`)."""

from __future__ import annotations

import logging
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mbcd_cli.errors import RunError
from mbcd_cli.files import delete, write_text
from mbcd_cli.settings import Settings
from mbcd_cli.settings.sources import parse_value
from mbcd_cli.sweep.packing import units
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.run import Board, begin, code_of, command_of, look_again, settle_cell, write_settings
from mbcd_cli.sweep.state import BUSY_CODE, DONE_CODE, FAILED_CODE, STOPPED_CODE, beside, state
from mbcd_cli.sweep.task import Task

if TYPE_CHECKING:
    from submitit import AutoExecutor
    from submitit import Job as SubmittedJob

_ARRAY_JOBS = 1000
"""Jobs of one array where the cluster does not say (MaxArraySize is 1001 unless a site says otherwise)."""
_QUEUE = ("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T")
_CANCELLED, _GONE = "CANCELLED", "GONE"
_ENDED = {_CANCELLED, _GONE, "COMPLETED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}
"""States of a job that will not go on. One whose node went down, or that was preempted, is PENDING again."""
_OWN_CODES = (DONE_CODE, FAILED_CODE, BUSY_CODE)
_LOOK = 20
"""Seconds between two looks at the queue, at most."""
DEFAULTS: dict[str, object] = {"timeout_min": 720, "cpus_per_task": 4}
"""submitit parameters where `--slurm` says nothing."""


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

    A cell whose job was killed is submitted again, `run.KILLS` times at most, one that was cancelled is not; a job that
    Slurm begins anew (its node went down, it was preempted) is waited for, and so is a cell that another job works on.

    Leaving (Ctrl-C) leaves the jobs in the queue; the same command later, on any machine of the cluster, finds them
    again, and what they have done.

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
    # It tells of every question that the cluster leaves unanswered, across the table of the cells.
    logging.getLogger("submitit").setLevel(logging.ERROR)
    look_at_the_queue(executor)
    each = threads or int(asked["cpus_per_task"])
    kills: dict[str, int] = {}
    together = units(cells, width=width, jobs=jobs, prepared=prepared or {})
    under_way = _found_again(board, executor, Path(folder).absolute())
    most = array_limit(executor.cluster)
    while board.waiting or board.elsewhere:
        busy = {cell.key for share, _ in under_way for cell in share}
        shares: dict[str, list[Cell]] = {}  # by the first of all, whether it is done or not
        for cell in board.waiting:
            if cell.key not in busy:
                write_settings(cell)
                shares.setdefault(together[cell.key][0].key, []).append(cell)
        begun = list(shares.values())
        try:
            for at in range(0, len(begun), most):
                with executor.batch():
                    for left in begun[at : at + most]:
                        task = Task(command_of(together[left[0].key], threads=each, width=width))
                        under_way.append((left, executor.submit(task)))
                for left, job in under_way[-len(begun[at : at + most]) :]:
                    for cell in left:
                        write_text(beside(cell.folder, _JOB), f"{job.job_id}\n", place="--runs-dir")
        except FailedJobError as error:
            why = str(error).strip().splitlines()[-1] if str(error).strip() else "sbatch failed"
            remedy = "Correct --slurm key=value, or ask for fewer runs."
            raise RunError(f"Slurm refuses the jobs: {why}", remedy) from error
        for one in list(under_way):
            left, job = one
            if _is_over(job, clustered=executor.cluster == "slurm"):
                under_way.remove(one)
                for cell in left:
                    board.waiting.remove(cell)
                    delete(beside(cell.folder, _JOB))
                    _settle(board, cell, job, kills, packed=len(together[cell.key]) > 1)
        for _ in range(len(board.elsewhere)):
            look_again(board, board.elsewhere.popleft())
        watch(board)
        if under_way or board.elsewhere:
            time.sleep(poll)
    return board


_JOB = "job"
"""Suffix of the file beside a run folder with the number of the job that works on it."""


def look_at_the_queue(executor: AutoExecutor) -> None:
    """Have submitit ask squeue for the states of jobs: sacct has none where a cluster keeps no accounts."""
    if executor.cluster != "slurm":
        return
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class QueueWatcher(SlurmInfoWatcher):
        def update(self) -> None:
            asked = set(self._registered)
            states = queue()
            self._last_status_check = time.time()
            if states is not None:
                self._info_dict = {job: {"State": states.get(job, _GONE)} for job in asked}

        def is_done(self, job_id: str, mode: str = "standard") -> bool:
            return self.get_state(job_id, mode=mode) in _ENDED

    if type(SlurmJob.watcher).__name__ != QueueWatcher.__name__:
        SlurmJob.watcher = QueueWatcher(delay_s=_LOOK)


def queue() -> dict[str, str] | None:
    """Number -> state of every job of ours that Slurm still knows; None where it does not answer."""
    with suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(_QUEUE, capture_output=True, text=True, timeout=60, check=True).stdout.split()
        return dict(line.split("|", 1) for line in lines)
    return None


def array_limit(cluster: str) -> int:
    """How many jobs of one array the cluster takes."""
    if cluster == "slurm":
        with suppress(OSError, subprocess.SubprocessError):
            command = ("scontrol", "show", "config")
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
            if found := re.search(r"^MaxArraySize\s*=\s*(\d+)", told, flags=re.MULTILINE):
                return max(int(found[1]), 1)
    return _ARRAY_JOBS


def _found_again(board: Board, executor: AutoExecutor, folder: Path) -> list[tuple[list[Cell], SubmittedJob]]:
    """Jobs of an earlier command that are in the queue still, and the waiting cells that each works on."""
    if executor.cluster != "slurm":
        return []
    from submitit.slurm.slurm import SlurmJob

    states, shares = queue() or {}, {}
    for cell in board.waiting:
        with suppress(OSError):
            shares.setdefault(beside(cell.folder, _JOB).read_text(encoding="utf-8").strip(), []).append(cell)
    return [(left, SlurmJob(folder, job)) for job, left in shares.items() if states.get(job, _GONE) not in _ENDED]


def _is_over(job: SubmittedJob, *, clustered: bool) -> bool:
    """Whether a job has ended for good: one that was stopped may be in the queue again, since Slurm took its node."""
    if not job.done():
        return False
    stopped = job.paths.result_pickle.exists() and job.exception() is None and job.result() not in _OWN_CODES
    return not (clustered and stopped) or job.watcher.is_done(job.job_id)


def _settle(board: Board, cell: Cell, job: SubmittedJob, kills: dict[str, int], *, packed: bool) -> None:
    """Where a cell goes whose job is over. Slurm itself may have begun it anew, when its node went down."""
    cancelled, told = job.state == _CANCELLED, job.paths.result_pickle.exists()
    # submitit waits long for a result of which nothing is there.
    error = None if cancelled and not told else job.exception()
    code = STOPPED_CODE if error is not None or not told else job.result()
    if cancelled and code not in _OWN_CODES and state(cell.folder) != "done":
        board.failed[cell.key] = f"job {job.job_id} was cancelled; the same command submits it again"
        return
    if packed:
        code = code_of(cell, code)
    elif code != FAILED_CODE and state(cell.folder) == "done":
        code = DONE_CODE
    settle_cell(board, cell, code, kills)
    if error is not None and cell.key in board.failed:
        board.failed[cell.key] = str(error).strip().splitlines()[-1]
