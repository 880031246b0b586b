"""From the cache to the device: batches read ahead by a thread, or the whole selected cache kept on a GPU.

Letters: N clips, B clips in a batch, R rows (clip x view), V stored training views.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import TEST_VIEW, Batch
from mbcd_cli.errors import SettingsError

_END = object()
_CHUNK = 32
"""Rows read and copied to the GPU at a time."""


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which a GPU copies without the processor's help.

    What a trunk has just computed on the GPU (`cache.views = 0`) stays there.
    """

    def pin(part: torch.Tensor) -> torch.Tensor:
        return part.pin_memory() if part.device.type == "cpu" else part

    return Batch(
        inputs={name: tuple(map(pin, parts)) for name, parts in batch.inputs.items()},
        labels=batch.labels.pin_memory(),
        domains=batch.domains.pin_memory(),
        clips=batch.clips.pin_memory(),
    )


def read_ahead(batches: Iterator[Batch], *, depth: int, pin: bool = False) -> Iterator[Batch]:
    """The same batches in the same order, up to `depth` of them read ahead by a thread.

    What the thread raises is raised here, in its place. Closing this generator ends the thread.

    Without it batches of 16 rows of 4.8 MB, read in 17 ms each, take 1.35 times as long where a step leaves the
    processor free for 50 ms (a GPU's, here a sleep), 1.2 times for 100 ms; where the step itself takes a core, about as
    long (1.03; AMD EPYC, two cores, medians of three in turns).

    Args:
        depth: 0 reads each batch when it is asked for.
        pin: hand them over in page-locked memory.
    """
    if depth == 0:
        yield from (pinned(batch) if pin else batch for batch in batches)
        return
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(pinned(batch) if pin else batch):
                    return
            put(_END)
        except BaseException as error:  # whatever it is, it belongs to the consumer
            put(error)

    thread = threading.Thread(target=work, name="mbcd-read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


class ResidentRows:
    """The rows of selected clips on a device; `read` stands in for reading the cache.

    Populations keep them in a CPU's memory, too: batches of av-digits take 1.16 times as long from the cache (in the
    page cache, checksums compared already; median of five in turns). On a GPU it has not been measured.

    Args:
        dataset: the open caches.
        training: clips whose V training views are kept, [n] indices.
        testing: clips whose test view is kept, [n] indices.
        device: where.
    """

    def __init__(self, dataset: Dataset, *, training: np.ndarray, testing: np.ndarray, device: torch.device) -> None:
        self._device = device
        self._parts: dict[tuple[str, bool], tuple[torch.Tensor, ...]] = {}
        self._where: dict[str, np.ndarray] = {}
        for name, cache in dataset.caches.items():
            where = np.full((len(dataset.clips), cache.views + 1), -1, np.int64)
            for test, clips, views in _rows(cache.views, training, testing):
                where[clips, views + 1] = np.arange(len(clips))
                chunks = [slice(i, i + _CHUNK) for i in range(0, len(clips), _CHUNK)]
                kept: tuple[torch.Tensor, ...] = ()
                for chunk in chunks:
                    parts = cache.read(clips[chunk], views[chunk])
                    kept = kept or tuple(
                        torch.empty((len(clips), *part.shape[1:]), dtype=part.dtype, device=device) for part in parts
                    )
                    for target, part in zip(kept, parts, strict=True):
                        target[chunk] = part.to(device)
                self._parts[name, test] = kept
            self._where[name] = where

    def read(self, name: str, clips: np.ndarray, views: np.ndarray) -> tuple[torch.Tensor, ...]:
        """The parts of `clips` [B] in `views` [B] (-1 = test view) of modality `name`, on the device."""
        return self.at(name, self.rows(name, clips, views), test=int(views[0]) == TEST_VIEW)

    def rows(self, name: str, clips: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """Where those lie, [B], for `at`."""
        return torch.from_numpy(self._where[name][clips, views + 1])

    def at(self, name: str, rows: torch.Tensor, *, test: bool = False) -> tuple[torch.Tensor, ...]:
        """The parts [..., ...] of `rows` [...], of the test view or of training views."""
        if rows.device.type == "cpu" and self._device.type == "cuda":
            rows = rows.pin_memory().to(self._device, non_blocking=True)
        rows = rows.to(self._device)
        return tuple(part.index_select(0, rows.flatten()).unflatten(0, rows.shape) for part in self._parts[name, test])


def _rows(stored: int, training: np.ndarray, testing: np.ndarray) -> list[tuple[bool, np.ndarray, np.ndarray]]:
    """(test?, clips [R], views [R]) of the two groups of rows, those that have any."""
    testing = np.unique(testing)
    groups = [
        (False, np.repeat(training, stored), np.tile(np.arange(stored), len(training))),
        (True, testing, np.full(len(testing), TEST_VIEW, np.int64)),
    ]
    return [group for group in groups if len(group[1])]


def resident_bytes(dataset: Dataset, *, training: np.ndarray, testing: np.ndarray) -> int:
    """Bytes that `ResidentRows` of these clips ([n] indices each) would take."""
    total = 0
    for cache in dataset.caches.values():
        for test, clips, _ in _rows(cache.views, training, testing):
            shapes = cache.shapes(TEST_VIEW if test else 0)
            total += len(clips) * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes)
    return total


def keep_on_device(
    dataset: Dataset, *, where: str, training: np.ndarray, testing: Sequence[np.ndarray], device: torch.device
) -> ResidentRows | None:
    """The selected rows on the GPU as `runtime.cache_device` asks, or None where the cache is read from disk.

    `auto` keeps them there when they take at most half of the GPU's free memory.

    Args:
        where: `runtime.cache_device`.
        training: clips whose training views are read, [n] indices. testing: those whose test view is, [n] each.

    Raises:
        SettingsError: `cuda` is asked for and there is no GPU, or not enough memory on it.
    """
    if where == "host" or (where == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise SettingsError(
            f"runtime.cache_device=cuda: the training runs on {device}.", "Use --device cuda, or cache_device=host."
        )
    tested = np.concatenate([np.empty(0, np.int64), *testing])
    need = resident_bytes(dataset, training=training, testing=tested)
    free, _ = torch.cuda.mem_get_info(device)
    if where == "auto" and need > free / 2:
        return None
    if need > free:
        raise SettingsError(
            f"runtime.cache_device=cuda: the selected clips take {need / 2**30:.1f} GB, {device} has "
            f"{free / 2**30:.1f} GB free.",
            "Use runtime.cache_device=host.",
        )
    return ResidentRows(dataset, training=training, testing=tested, device=device)
