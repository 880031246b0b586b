"""Units as jobs of a Slurm cluster, through submitit (dependency group `slurm`)."""

from __future__ import annotations

import logging
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from mbcd_cli.errors import RunError, lines_of
from mbcd_cli.launch.launch import Ended
from mbcd_cli.launch.nodes import Demands
from mbcd_cli.launch.task import STOPPED_CODES, Task
from mbcd_cli.launch.unit import BUSY_CODE, DONE_CODE, FAILED_CODE, Unit, beside
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings.sources import parse_value

if TYPE_CHECKING:
    from submitit import AutoExecutor
    from submitit import Job as SubmittedJob

_ARRAY_JOBS = 1000
"""Jobs of one array where the cluster does not say (MaxArraySize is 1001 unless a site says otherwise)."""
_QUEUE = ("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r")
_CANCELLED, _GONE = "CANCELLED", "GONE"
_TAKEN = {"NODE_FAIL", "PREEMPTED"}
"""States of a job whose node went down, or that was preempted, where a cluster does not put such jobs back (else it is
PENDING again): no failure of its units."""
_ENDED = {*_TAKEN, _CANCELLED, _GONE, "COMPLETED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
"""States of a job that will not go on."""
_OWN_CODES = (DONE_CODE, FAILED_CODE, BUSY_CODE)
_NEVER = "TimeLimit|NodeLimit|BadConstraints|Invalid|PartitionDown|PartitionInactive|PartitionConfig|MaxWall|NotAllowed"
"""Reasons of squeue for which a job does not begin before somebody changes something."""
_LOOK = 20
"""Seconds between two looks at the queue, at most."""
_LAST_SECONDS = 10.0
"""What jobs whose units are all done have for their own end, when the command leaves."""
_TIMEOUTS = 1000
"""Times that a job which reaches its time limit is begun anew: a job of many units does so as a matter of course."""
DEFAULTS: dict[str, object] = {"timeout_min": 720, "cpus_per_task": 4}
"""submitit parameters where `--slurm` says nothing."""
_JOB = "job"
"""Suffix of the file beside a folder with the number of the job that has it."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A job as squeue tells it: its state, where it runs, why it waits."""

    state: str
    node: str
    reason: str


@dataclass(slots=True, eq=False)
class _Job:
    """A job and the units that it has not ended, in its order."""

    job: SubmittedJob
    left: list[Unit]


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


class Slurm:
    """The engine of a Slurm cluster: units in array tasks, each of which runs its share one after the other.

    A job that Slurm begins anew (its node went down, it was preempted) is waited for. Leaving (Ctrl-C) leaves the jobs
    in the queue; the same command later, on any machine of the cluster, finds them again.

    Args:
        folder: where submitit's own logs go, unless the option `folder` says so.
        options: `key=value` parameters of submitit; `cluster=local` runs the jobs as processes of this machine.
        tasks: into how many jobs units are grouped; None: one each. Never more than the cluster takes.
        threads: CPU threads of a job; 0 takes `cpus_per_task`.
        demands: what nodes have to have.
        say: told what cannot be seen of the units' states.

    Raises:
        RunError: submitit is missing or refuses a parameter, or there is no Slurm here.
    """

    def __init__(
        self,
        folder: Path,
        *,
        options: Sequence[str],
        demands: Demands,
        tasks: int | None = None,
        threads: int = 0,
        say: Say = SILENT,
    ) -> None:
        asked = DEFAULTS | parse_options(options)
        try:
            import submitit
        except ImportError as error:
            raise RunError(
                "--launcher slurm needs submitit, which is not installed.", "Install it: uv sync --group slurm."
            ) from error
        self._folder = Path(asked.pop("folder", None) or folder).absolute()
        cluster = asked.pop("cluster", None)
        self._asked = " --slurm ".join(f"{key}={value}" for key, value in asked.items())
        try:
            executor = submitit.AutoExecutor(folder=self._folder, cluster=cluster, slurm_max_num_timeout=_TIMEOUTS)
            if executor.cluster == "local" and cluster != "local":
                raise RunError("There is no Slurm here (no srun).", "Use --launcher local, or --slurm cluster=local.")
            executor.update_parameters(**asked)
        except (NameError, TypeError, ValueError) as error:
            raise RunError(f"submitit refuses: {error}", "Correct --slurm key=value.") from error
        # It tells of every question that the cluster leaves unanswered, across the table of the cells.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        look_at_the_queue(executor)
        self._executor, self._clustered = executor, executor.cluster == "slurm"
        self._tasks, self._demands, self._say = tasks, demands, say
        self._threads = threads or int(asked["cpus_per_task"])
        self._jobs: list[_Job] = []
        self._told: set[str] = set()

    @property
    def room(self) -> int:
        return 10**9

    def find(self, units: Sequence[Unit]) -> Sequence[Unit]:
        if not self._clustered:
            return []
        from submitit.slurm.slurm import SlurmJob

        states, shares = jobs_left() or set(), {}
        for unit in units:
            with suppress(OSError):
                job = beside(unit.pieces[0].folder, _JOB).read_text(encoding="utf-8").strip()
                under_way = any(unit.state(piece) not in ("done", "failed") for piece in unit.pieces)
                if under_way and job in states:
                    shares.setdefault(job, []).append(unit)
        self._jobs += [_Job(SlurmJob(self._folder, job), list(share)) for job, share in shares.items()]
        return [unit for share in shares.values() for unit in share]

    def submit(self, units: Sequence[Unit]) -> None:
        from submitit.core.utils import FailedJobError

        limit = job_limit(self._executor.cluster)
        count = max(min(self._tasks or len(units), len(units), limit), 1)
        if (self._tasks or len(units)) > limit and len(units) > limit and "limit" not in self._told:
            self._told.add("limit")
            self._say(f"The cluster takes {limit} jobs of one array: {len(units)} units go into {limit}.")
        shares = [units[at::count] for at in range(count)]
        try:
            with redirect_stderr(StringIO()), self._executor.batch():  # sbatch's own words are in the error
                begun = [
                    self._executor.submit(
                        Task(tuple(unit.order(self._threads) for unit in share), self._threads, self._demands)
                    )
                    for share in shares
                ]
            if self._clustered and "jobs" not in self._told:
                self._told.add("jobs")
                first, last = begun[0].job_id, begun[-1].job_id
                numbers = first if first == last else f"{first} to {last}"
                self._say(f"Slurm has the jobs {numbers}, whose states squeue tells; Ctrl-C leaves them there.")
            for share, job in zip(shares, begun, strict=True):
                self._jobs.append(_Job(job, list(share)))
                for unit in share:
                    for piece in unit.pieces:  # a hint, which need not survive a power cut: the lock keeps order
                        beside(piece.folder, _JOB).write_text(f"{job.job_id}\n", encoding="utf-8")
        except FailedJobError as error:
            why = re.sub("^sbatch: error: (Batch job submission failed: )?", "", lines_of(error)[-1])
            remedy = f"Ask for what there is (--slurm {self._asked}), or for fewer jobs."
            raise RunError(f"Slurm refuses the jobs: {why}", remedy) from error

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def ended(self) -> Iterator[Ended]:
        for one in list(self._jobs):
            if self._is_over(one.job):
                self._jobs.remove(one)
                ends = list(self._ends_of(one))
            else:
                ends = []
                while one.left and all(one.left[0].state(piece) in ("done", "failed") for piece in one.left[0].pieces):
                    unit = one.left.pop(0)  # units are run in this order
                    code = DONE_CODE if all(unit.state(piece) == "done" for piece in unit.pieces) else FAILED_CODE
                    ends.append(Ended(unit, code))
            for end in ends:
                for piece in end.unit.pieces:
                    beside(piece.folder, _JOB).unlink(missing_ok=True)
                yield end

    def _is_over(self, job: SubmittedJob) -> bool:
        """Whether it has ended for good: one that was stopped may be in the queue again, since Slurm took its node."""
        if not job.done():
            return False
        stopped = False
        if job.paths.result_pickle.exists() and job.exception() is None:
            result = job.result()
            stopped = not isinstance(result, str) and any(code not in _OWN_CODES for code in result.values())
        return not (self._clustered and stopped) or job.watcher.is_done(job.job_id)

    def _ends_of(self, one: _Job) -> Iterator[Ended]:
        """How the units of a job ended that is over. Slurm may have begun it anew, when its node went down."""
        job, told = one.job, one.job.paths.result_pickle.exists()
        cancelled, taken = job.state == _CANCELLED, job.state in _TAKEN
        # submitit waits long for a result of which nothing is there.
        error = None if (cancelled or taken) and not told else job.exception()
        told = job.paths.result_pickle.exists()
        result: dict[str, int] | str = {} if error is not None or not told else job.result()
        if isinstance(result, str):
            self._say.warn(f"{result}; --slurm slurm_exclude=NODE leaves a node out.")
            yield from (Ended(unit, None, result, again=False) for unit in one.left)
            return
        for unit in one.left:
            code = result.get(unit.order(self._threads).log)
            if cancelled and code not in _OWN_CODES:
                why = f"job {job.job_id} was cancelled; the same command submits it again"
                yield Ended(unit, code, why, again=False)
            elif code in STOPPED_CODES or (taken and code not in _OWN_CODES):
                yield Ended(unit, None)
            elif error is not None or not told:  # the job itself could not begin, or was killed
                yield Ended(unit, -9, self._why(job, error))
            else:
                yield Ended(unit, code)

    def _why(self, job: SubmittedJob, error: Exception | None) -> str:
        """Why a job has no result, in one line."""
        if trace := re.search(r"^-{9,}\n(.+)\n-{9,}$", str(error or ""), flags=re.MULTILINE | re.DOTALL):
            return trace[1].strip().splitlines()[-1]
        now = getattr(job.watcher, "queue", {}).get(job.job_id)
        where = f" on node {now.node} ({now.state})" if now is not None and now.node else ""
        if said := (job.stderr() or "").strip():
            return f"job {job.job_id} ended without a result{where}: {said.splitlines()[-1].strip()}"
        return (
            f"job {job.job_id} ended{where} without a result or a log: that node may not see {self._folder}; "
            "--slurm slurm_exclude=NODE leaves a node out"
        )

    def running(self) -> Mapping[str, str]:
        if not self._clustered:
            return {one.left[0].pieces[0].key: "" for one in self._jobs if one.left}
        found = {}
        states = self._jobs[0].job.watcher.queue if self._jobs else {}
        for one in self._jobs:
            now = states.get(one.job.job_id)
            if now is not None and now.state == "RUNNING" and one.left:
                found[one.left[0].pieces[0].key] = now.node
            if now is not None and now.state == "PENDING" and one.job.job_id not in self._told:
                self._tell_of(one.job.job_id, now.reason)
        return found

    def _tell_of(self, job: str, reason: str) -> None:
        """Why a job waits, where it would wait for ever."""
        held = "held" in reason.lower()
        if held or re.search(_NEVER, reason):
            self._told.add(job)
            then = f"`scontrol release {job}`; its node's log says why" if held else "--slurm asks for what there is"
            self._say.warn(
                f"Slurm {'holds' if held else 'keeps'} job {job} ({reason}): it does not begin until {then}."
            )

    def stop(self) -> None:
        """Leave the jobs where they are, but for those that have not begun and that nothing is left for.

        One that is just ending writes its result first: the folder may be deleted next, and Slurm would call it failed.
        """
        idle = [one.job for one in self._jobs if not one.left] if self._clustered else []
        states = queue() or {} if idle else {}
        latest = time.monotonic() + _LAST_SECONDS
        for job in idle:
            now = states[job.job_id].state if job.job_id in states else _GONE
            if now == "PENDING":
                job.cancel(check=False)
            while now == "RUNNING" and not job.paths.result_pickle.exists() and time.monotonic() < latest:
                time.sleep(0.1)


def look_at_the_queue(executor: AutoExecutor) -> None:
    """Have submitit ask squeue for the states of jobs: sacct has none where a cluster keeps no accounts."""
    if executor.cluster != "slurm":
        return
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class QueueWatcher(SlurmInfoWatcher):
        queue: Mapping[str, Queued] = MappingProxyType({})

        def update(self) -> None:
            states = queue()
            self._last_status_check = time.time()
            if states is not None:
                self.queue = states
                gone = Queued(_GONE, "", "")
                self._info_dict = {job: {"State": states.get(job, gone).state} for job in self._registered}

        def is_done(self, job_id: str, mode: str = "standard") -> bool:
            return self.get_state(job_id, mode=mode) in _ENDED

    if type(SlurmJob.watcher).__name__ != QueueWatcher.__name__:
        SlurmJob.watcher = QueueWatcher(delay_s=_LOOK)


def queue() -> dict[str, Queued] | None:
    """Every job of ours that Slurm still knows, by number; None where it does not answer."""
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(_QUEUE, capture_output=True, text=True, timeout=60, check=True).stdout
        return {job: Queued(*more) for job, *more in (line.split("|", 3) for line in told.splitlines())}
    return None


def jobs_left() -> set[str] | None:
    """Numbers of our jobs that will go on, or begin; None where Slurm does not answer, or there is none."""
    states = queue()
    return None if states is None else {job for job, queued in states.items() if queued.state not in _ENDED}


def job_limit(cluster: str) -> int:
    """How many jobs of one array the cluster takes now: MaxArraySize, and what MaxJobCount leaves."""
    if cluster == "slurm":
        with suppress(OSError, subprocess.SubprocessError):
            command = ("scontrol", "show", "config")
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
            limits = dict(re.findall(r"^(MaxArraySize|MaxJobCount)\s*=\s*(\d+)", told, flags=re.MULTILINE))
            if "MaxArraySize" in limits:
                # An array that would fill it is not refused: sbatch waits, without a word.
                free = int(limits.get("MaxJobCount", 10**9)) - 1 - len(queue() or {})
                return max(min(int(limits["MaxArraySize"]), free), 1)
    return _ARRAY_JOBS
