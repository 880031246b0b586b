"""Decoding clips in worker processes, in order, surviving files that crash or hang a decoder.

Letters: V views of one clip.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from mbcd_cli.allocator import keep_freed_memory
from mbcd_cli.data.media.checks import allowed_seconds
from mbcd_cli.data.media.sharing import Blocks, share
from mbcd_cli.data.modalities.base import Modality, load_views
from mbcd_cli.data.records import Clip, Rejected
from mbcd_cli.errors import MbcdError, MediaError
from mbcd_cli.settings import DatasetSettings


def patience(clip: Clip, name: str) -> float:
    """Seconds after which a worker that decodes a clip is given up.

    The decoder itself stops after `allowed_seconds`; twice that is for one that no longer answers (a file system that
    hangs).
    """
    media = clip.media[name]
    return 2 * allowed_seconds(media.path, media.path_v, media.clock)


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """What a worker needs besides the clip: the modality, its settings, the dataset's and the seed of the views."""

    name: str
    modality: Modality
    dataset: DatasetSettings
    seed: int


@dataclass(slots=True)
class Decoded:
    """The views of one clip, each a tuple of parts; or why there are none."""

    index: int
    views: list[int]
    parts: list[tuple[np.ndarray, ...]]
    rejected: Rejected | None = None
    notes: list[str] = field(default_factory=list)


def _begin_worker() -> None:
    """One thread per worker: the workers are the parallelism. Ctrl-C is the parent's to handle."""
    cv2.setNumThreads(1)
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed ends; the fork server and the blocks of shared memory go with the last one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def rejection(clip: Clip, name: str, cause: str) -> Rejected:
    """A clip left out for a cause that no decoder put into words."""
    return Rejected(clip.id, name, str(clip.media[name].path), cause, "Re-encode or replace the file.")


def decode(index: int, clip: Clip, views: list[int], job: DecodeJob) -> Decoded:
    """Decode one clip, once, into its views; a bad file becomes a rejection, not an exception."""
    notes: list[str] = []
    try:
        parts = load_views(clip, job.name, job.modality, views=views, seed=job.seed, dataset=job.dataset, notes=notes)
    except MediaError as error:
        return Decoded(index, views, [], Rejected(clip.id, job.name, error.file, error.cause, error.remedy))
    except MbcdError:
        raise
    except Exception as error:  # a decoder's own exception must not end the other clips' preparation
        return Decoded(index, views, [], rejection(clip, job.name, f"{type(error).__name__}: {error}"))
    return Decoded(index, views, parts, notes=notes)


def decode_shared(block: str | None, work: Callable[..., Decoded], *item: Any) -> Any:
    """`decode` in a worker: large results travel through the block of shared memory lent for it."""
    return share(work(*item), block)


Item = tuple[int, Clip, list[int], DecodeJob]


class Decoder:
    """Decodes clips in order with bounded look-ahead.

    Args:
        workers: processes; 0 decodes in this process.
        job: what to decode, where all clips of `run` have the same.
    """

    def __init__(self, *, workers: int, job: DecodeJob | None = None) -> None:
        self.workers = workers
        self.job = job
        self._pool: ProcessPoolExecutor | None = None
        self._blocks = Blocks()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._blocks.close()

    def _start(self, workers: int) -> ProcessPoolExecutor:
        # forkserver: no fork of a process that already runs torch's threads, and the imports are paid once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"{__package__}.{name}" for name in ("arrays", "flow", "sound", "decoding")])
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
        pool.submit(int).result()  # what a worker takes to start is no file's fault
        return pool

    def _stop(self) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()  # a hanging decoder would otherwise keep the command from ending
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, items: Sequence[tuple[int, Clip, list[int]]]) -> Iterator[Decoded]:
        """(index, clip, views) -> `Decoded`, in the order given."""
        return self.run_jobs([(*item, self.job) for item in items])

    def run_jobs(self, items: Sequence[Item], *, ahead: int = 0) -> Iterator[Decoded]:
        """(index, clip, views, job) -> `Decoded`, in the order given; at most `ahead` results wait to be taken.

        The workers are handed at least two clips each, whatever `ahead` says, so that none is ever idle.
        """
        if not self.workers:
            for item in items:
                yield decode(*item)
            return
        todo = deque(items)
        flight: deque[tuple[Item, Future[Any], str | None]] = deque()
        depth = max(2 * self.workers + 2, ahead)
        try:
            while todo or flight:
                self._pool = self._pool or self._start(self.workers)
                try:
                    while todo and len(flight) < depth:
                        block = self._blocks.lend()
                        flight.append((todo[0], self._pool.submit(decode_shared, block, decode, *todo[0]), block))
                        todo.popleft()
                    _, clip, _, job = flight[0][0]
                    result = flight[0][1].result(timeout=patience(clip, job.name))
                except (BrokenProcessPool, FutureTimeout):
                    # One of the clips in flight killed or hung its worker: find it by decoding them one at a time.
                    suspects = [item for item, _, _ in flight]
                    self._abandon(flight)
                    for item in suspects:
                        yield self._alone(item)
                    continue
                yield self._blocks.receive(result, flight.popleft()[2])
        finally:
            if flight:  # left before the end
                self._abandon(flight)

    def _abandon(self, flight: deque[tuple[Item, Future[Any], str | None]]) -> None:
        """Stop the workers; their blocks are free."""
        self._stop()
        for _, _, block in flight:
            if block is not None:
                self._blocks.give_back(block)
        flight.clear()

    def _alone(self, item: Item) -> Decoded:
        index, clip, views, job = item
        self._pool = self._start(1)
        limit = patience(clip, job.name)
        try:
            return self._pool.submit(decode, index, clip, views, job).result(timeout=limit)
        except BrokenProcessPool:
            cause = "the decoder crashed on this file"
        except FutureTimeout:
            cause = f"the decoder did not finish within {limit:.0f} s"
        finally:
            self._stop()
        return Decoded(index, views, [], rejection(clip, job.name, cause))
