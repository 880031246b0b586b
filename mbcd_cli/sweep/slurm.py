"""Running a sweep's cells as jobs of a Slurm cluster, through submitit (dependency group `slurm`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mbcd_cli.errors import RunError
from mbcd_cli.settings import Settings
from mbcd_cli.settings.sources import parse_value
from mbcd_cli.sweep.packing import units
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.run import Board, begin, code_of, command_of, look_again, settle_cell, write_settings
from mbcd_cli.sweep.state import DONE_CODE, FAILED_CODE, STOPPED_CODE, state
from mbcd_cli.sweep.task import Task

if TYPE_CHECKING:
    from submitit import Job as SubmittedJob

_ARRAY_JOBS = 1000
"""Jobs of one array: Slurm takes no more than MaxArraySize (1001 unless a site says otherwise)."""
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

    A cell whose job was killed is submitted again, `run.KILLS` times at most; one that another job works on is waited
    for (a job that Slurm has begun anew, because its node went down).

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
    # It tells of every question that the cluster leaves unanswered, across the table of the cells.
    logging.getLogger("submitit").setLevel(logging.ERROR)
    each = threads or int(asked["cpus_per_task"])
    kills: dict[str, int] = {}
    together = units(cells, width=width, jobs=jobs, prepared=prepared or {})
    under_way: list[tuple[list[Cell], SubmittedJob]] = []
    while board.waiting or board.elsewhere:
        busy = {cell.key for share, _ in under_way for cell in share}
        shares: dict[str, list[Cell]] = {}  # by the first of all, whether it is done or not
        for cell in board.waiting:
            if cell.key not in busy:
                write_settings(cell)
                shares.setdefault(together[cell.key][0].key, []).append(cell)
        begun = list(shares.values())
        try:
            for at in range(0, len(begun), _ARRAY_JOBS):
                with executor.batch():
                    for left in begun[at : at + _ARRAY_JOBS]:
                        task = Task(command_of(together[left[0].key], threads=each, width=width))
                        under_way.append((left, executor.submit(task)))
        except FailedJobError as error:
            why = str(error).strip().splitlines()[-1] if str(error).strip() else "sbatch failed"
            remedy = "Correct --slurm key=value, or ask for fewer runs."
            raise RunError(f"Slurm refuses the jobs: {why}", remedy) from error
        for one in list(under_way):
            left, job = one
            if job.done():
                under_way.remove(one)
                for cell in left:
                    board.waiting.remove(cell)
                    _settle(board, cell, job, kills, packed=len(together[cell.key]) > 1)
        for _ in range(len(board.elsewhere)):
            look_again(board, board.elsewhere.popleft())
        watch(board)
        if under_way or board.elsewhere:
            time.sleep(poll)
    return board


def _settle(board: Board, cell: Cell, job: SubmittedJob, kills: dict[str, int], *, packed: bool) -> None:
    """Where a cell goes whose job is over. Slurm itself may have begun it anew, when its node went down."""
    error = job.exception()
    code = STOPPED_CODE if error is not None else job.result()
    if packed:
        code = code_of(cell, code)
    elif code != FAILED_CODE and state(cell.folder) == "done":
        code = DONE_CODE
    settle_cell(board, cell, code, kills)
    if error is not None and cell.key in board.failed:
        board.failed[cell.key] = str(error).strip().splitlines()[-1]
