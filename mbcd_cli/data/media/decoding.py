"""Decoding clips in worker processes, in order, surviving files that crash or hang a decoder.

Letters: V views of one clip.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import cv2

from mbcd_cli.allocator import keep_freed_memory
from mbcd_cli.data.corruptions import Corruption
from mbcd_cli.data.media.checks import allowed_seconds, unreadable
from mbcd_cli.data.media.sharing import Blocks, share
from mbcd_cli.data.modalities.modality import Modality, load_views
from mbcd_cli.data.records import Clip, Decoded, Rejected
from mbcd_cli.errors import MbcdError, MediaError, RunError
from mbcd_cli.settings import DatasetSettings

_HANDED = 4
"""Clips that a worker is handed at most, the one in its hands included: it never waits for this process."""
_OUTER = 2
"""By how much those who wait are more patient than the decoder itself."""
_PAUSES = (0.01, 0.1, 1.0)
"""Seconds before another attempt to start a worker."""
_STARTS = 3
"""Workers in a row that may end before they begin."""
_SOCKET_FOLDER = 70
"""Bytes of the longest path whose `pymp-xxxxxxxx/listener-xxxxxxxx` is no longer than the name of a socket may be."""


def patience(clip: Clip, name: str) -> float:
    """Seconds after which a worker that decodes a clip is given up, unless its decoder takes more (`Deadline.told`).

    The decoder itself stops after `allowed_seconds`; `_OUTER` times that is for one that no longer answers (a file
    system that hangs).
    """
    media = clip.media[name]
    return _OUTER * allowed_seconds(media.path, media.path_v, media.clock)


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """What a worker needs besides the clip: the modality, its settings, the dataset's, the seed of the views, and what
    is done to the media first.

    In place of a modality's settings there may be anything with its `random` and `views`: an audit's `Glance`.
    """

    name: str
    modality: Modality
    dataset: DatasetSettings
    seed: int
    corruption: Corruption | None = None


def rejection(clip: Clip, name: str, cause: str) -> Rejected:
    """A clip left out for a cause that no decoder put into words."""
    return Rejected(clip.id, name, clip.media[name].source, cause, "Re-encode or replace the file.")


def decode(index: int, clip: Clip, views: list[int], job: DecodeJob) -> Decoded:
    """Decode one clip, once, into its views; a bad file becomes a rejection, not an exception."""
    notes: list[str] = []
    try:
        told = {"views": views, "seed": job.seed, "dataset": job.dataset, "corruption": job.corruption}
        try:
            parts = load_views(clip, job.name, job.modality, **told, notes=notes)
        except PermissionError as error:  # whoever looked first
            raise unreadable(error.filename or clip.media[job.name].path, error) from None
    except MediaError as error:
        return Decoded(index, views, [], Rejected(clip.id, job.name, error.file, error.cause, error.remedy))
    except MbcdError:
        raise
    except Exception as error:  # a decoder's own exception must not end the other clips' preparation
        return Decoded(index, views, [], rejection(clip, job.name, f"{type(error).__name__}: {error}"))
    return Decoded(index, views, parts, notes=notes)


Item = tuple[int, Clip, list[int], DecodeJob]


def _serve(connection: Connection) -> None:
    """A worker: says that it is there, then decodes what it is handed, in order, until nobody asks any more.

    One thread per worker: the workers are the parallelism. Ctrl-C is the parent's to handle.
    """
    from mbcd_cli.data.media.timeline import Deadline

    cv2.setNumThreads(1)
    Deadline.told = connection.send
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(None)
        while True:
            block, work, item = connection.recv()
            connection.send(0.0)  # from here on the clip may be to blame
            try:
                answer = share(work(*item), block)
            except MbcdError as error:
                answer = error
            connection.send(answer)


def _end_with_parent() -> None:
    """A worker whose parent was killed ends; the fork server and the blocks of shared memory go with the last one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def _room_for_a_socket() -> Iterator[None]:
    """The fork server's socket lies in the folder of temporary files, or in /tmp where that one's path is too long."""
    before = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > _SOCKET_FOLDER:
        tempfile.tempdir = "/tmp"
    try:
        yield
    finally:
        tempfile.tempdir = before


@dataclass(slots=True)
class _Task:
    """A clip on its way: where it stands among all, the block lent for its result, how often it took a worker down."""

    number: int
    item: Item
    block: str | None = None
    failures: int = 0

    @property
    def patience(self) -> float:
        _, clip, _, job = self.item
        return patience(clip, job.name)


@dataclass(slots=True)
class _Worker:
    """A process and the pipe that only it and this process hold, so that its end, however sudden, ends the pipe.

    Attributes:
        tasks: handed to it and not answered; it is at the first.
        since: when it began with that one; infinite before it said that it is there.
        granted: until when its decoder itself may take, of that one.
        at_work: whether it has said that it has that one in its hands.
    """

    process: BaseProcess
    connection: Connection
    tasks: deque[_Task] = field(default_factory=deque)
    since: float = math.inf
    granted: float = 0.0
    at_work: bool = False

    @property
    def deadline(self) -> float:
        return max(self.since + self.tasks[0].patience, self.granted) if self.tasks else math.inf

    def begin(self) -> None:
        """It turns to the next task."""
        self.since, self.granted, self.at_work = time.monotonic(), 0.0, False

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


class Decoder:
    """Decodes clips in order with bounded look-ahead.

    A clip that its worker did not survive, or does not answer for, is tried once more in a new one; no other clip is
    touched.

    Args:
        workers: processes; 0 decodes in this process.
        job: what to decode, where all clips of `run` have the same.
    """

    def __init__(self, *, workers: int, job: DecodeJob | None = None) -> None:
        self.workers = workers
        self.job = job
        self._blocks = Blocks()
        self._team: list[_Worker] = []
        self._lost_starts = 0
        # forkserver: no fork of a process that already runs torch's threads, and the imports are paid once.
        self._context = multiprocessing.get_context("forkserver")

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._dismiss()
        self._blocks.close()

    def run(self, items: Iterable[tuple[int, Clip, list[int]]]) -> Iterator[Decoded]:
        """(index, clip, views) -> `Decoded`, in the order given."""
        return self.run_jobs((*item, self.job) for item in items)

    def run_jobs(self, items: Iterable[Item], *, ahead: int = 0) -> Iterator[Decoded]:
        """(index, clip, views, job) -> `Decoded`, in the order given; at most `ahead` results wait to be taken.

        The workers are handed at least two clips each, whatever `ahead` says, so that none is ever idle. Items are
        taken as they are handed out.

        Raises:
            RunError: no worker can be started.
        """
        if not self.workers:
            for item in items:
                yield decode(*item)
            return
        tasks = (_Task(number, item) for number, item in enumerate(items))
        todo: deque[_Task] = deque()
        done: dict[int, Decoded] = {}
        depth = max(2 * self.workers + 2, ahead)
        taken = 0
        try:
            for number in itertools.count():
                new = list(itertools.islice(tasks, number + depth - taken))
                todo += new
                taken += len(new)
                if number == taken:
                    return
                while True:
                    self._hand_out(todo)
                    self._hear(todo, done, waiting=number not in done)
                    if number in done:
                        break
                yield done.pop(number)
        finally:
            if any(worker.tasks for worker in self._team):  # left before the end
                self._dismiss()

    def _hand_out(self, todo: deque[_Task]) -> None:
        """Give the workers what is to be done, the least busy first."""
        while todo:
            if len(self._team) < self.workers:
                self._team.append(self._start())
            worker = min(self._team, key=lambda member: len(member.tasks))
            if len(worker.tasks) >= _HANDED:
                return
            task = todo.popleft()
            task.block = self._blocks.lend()
            if not worker.tasks and worker.since < math.inf:
                worker.begin()
            worker.tasks.append(task)
            with contextlib.suppress(OSError):  # it has just ended, which is heard next
                worker.connection.send((task.block, decode, task.item))

    def _start(self) -> _Worker:
        self._context.set_forkserver_preload(
            [f"{__package__}.{name}" for name in ("fork_server", "arrays", "flow", "sound", "decoding")]
        )
        ours, its = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(its,), daemon=True)
        for pause in _PAUSES:
            try:
                with _room_for_a_socket():
                    process.start()
                break
            except (OSError, EOFError):  # the fork server was killed; once it is gone, a start brings a new one
                time.sleep(pause)
        else:
            process.start()
        its.close()
        return _Worker(process, ours)

    def _hear(self, todo: deque[_Task], done: dict[int, Decoded], *, waiting: bool) -> None:
        """Take what the workers have answered; where `waiting`, not before one has, or is given up."""
        now = time.monotonic()
        pause = min((worker.deadline for worker in self._team), default=now) - now if waiting else 0.0
        ready = wait([worker.connection for worker in self._team], None if pause == math.inf else max(pause, 0.0))
        for worker in list(self._team):
            if worker.connection in ready:
                try:
                    answer = worker.connection.recv()
                except (EOFError, OSError):
                    self._lose(worker, todo, done, "the decoder crashed on this file")
                    continue
                if isinstance(answer, float):  # the seconds of its decoder's own deadline
                    worker.granted, worker.at_work = max(worker.granted, time.monotonic() + _OUTER * answer), True
                    continue
                if worker.since < math.inf:
                    self._take(worker.tasks.popleft(), answer, done)
                worker.begin()
                self._lost_starts = 0
            elif worker.deadline <= time.monotonic():
                limit, worker.at_work = worker.deadline - worker.since, True
                self._lose(worker, todo, done, f"the decoder did not finish within {limit:.0f} s")

    def _take(self, task: _Task, answer: object, done: dict[int, Decoded]) -> None:
        if isinstance(answer, MbcdError):
            raise answer
        done[task.number] = self._blocks.receive(answer, task.block)

    def _lose(self, worker: _Worker, todo: deque[_Task], done: dict[int, Decoded], cause: str) -> None:
        """A worker has ended, or must: what it was at is tried once more or rejected, the rest is still to do."""
        begun = worker.since < math.inf
        self._dismiss(worker)
        if worker.at_work and worker.tasks:
            task = worker.tasks[0]
            task.failures += 1
            if task.failures > 1:
                index, clip, views, job = task.item
                done[task.number] = Decoded(index, views, [], rejection(clip, job.name, cause))
                worker.tasks.popleft()
        elif not begun:
            self._lost_starts += 1
            if self._lost_starts >= _STARTS:
                raise RunError(
                    f"{_STARTS} decoding workers ended before they began.",
                    "Is there memory for them? --workers 0 decodes in the command's own process.",
                )
        todo.extendleft(reversed(worker.tasks))

    def _dismiss(self, *workers: _Worker) -> None:
        """End some workers, or all; the blocks of what they had are free."""
        for worker in workers or tuple(self._team):
            worker.end()
            self._team.remove(worker)
            for task in worker.tasks:
                if task.block is not None:
                    self._blocks.give_back(task.block)
