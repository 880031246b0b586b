"""What the training loop draws from: batches on the device, this process' rows of them, and the time spent waiting.

Letters: N clips.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch

from mbcd_cli.data.loading import read_ahead
from mbcd_cli.data.protocol import Dataset, Read
from mbcd_cli.data.records import Batch, Parts
from mbcd_cli.processes import ALONE, Group


class Feed:
    """Batches of a dataset, read ahead and brought to the device.

    Attributes:
        device: where batches go.
        inputs: (modality, parts of a training batch) -> its inputs, where parts stand for them and training batches
            stay where they are; None: parts are inputs.

    Args:
        dataset: what `open_dataset` returns (its `batches` is used).
        device: where batches go; they are copied without waiting, from page-locked memory, on CUDA.
        ahead: training batches read ahead by a thread.
        read: rows that lie on the device already (`data.loading.ResidentRows.read`), or None.
        inputs: see the attribute.
        group: the processes that share every batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        device: torch.device,
        ahead: int = 0,
        read: Read | None = None,
        inputs: Callable[[str, Parts], Parts] | None = None,
        group: Group = ALONE,
    ) -> None:
        self._dataset = dataset
        self.device = device
        self.inputs = inputs
        self._ahead = 0 if read is not None else ahead
        self._pin = device.type == "cuda" and read is None
        self._options: dict[str, Any] = {} if read is None else {"read": read}
        self._group = group
        self.reset()

    def reset(self) -> None:
        """Begin to count the waiting anew."""
        self._waited = 0.0
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def waited(self) -> float:
        """Seconds of waiting for batches since `reset`: the loop's or, on CUDA, those in which the GPU had nothing to
        do but make one (asking waits for it)."""
        if self._idle:
            self._idle[-1][1].synchronize()
        return self._waited + sum(begin.elapsed_time(end) for begin, end in self._idle) / 1000

    def training(
        self, clips: np.ndarray, *, batch_size: int, seed: int, epoch: int, start: int, views: int = 1
    ) -> Iterator[tuple[torch.Tensor, Batch]]:
        """(clip indices [B] on the CPU, batch on the device but for `inputs`), in the order that (seed, epoch) fixes.

        Args:
            clips: to train on, [N] indices into the clip table.
            batch_size: clips of the global batch.
            start: batches to skip.
            views: views of every clip per batch; with 2, rows 2i and 2i + 1 of a batch are two views of one clip.
        """
        options = dict(self._options)
        if self._group.world > 1:
            options["share"] = (self._group.rank, self._group.world)
        options |= {"batch_size": batch_size, "training": True, "seed": seed, "epoch": epoch, "start": start}
        batches = self._dataset.batches(clips, drop_last=True, views=views, **options)
        with closing(read_ahead(batches, depth=self._ahead, pin=self._pin)) as ready:
            cuda = self.device.type == "cuda"
            while True:
                asked, done = time.monotonic(), _event() if cuda and self.inputs is None else None
                batch = next(ready, None)
                if batch is None:
                    return
                if done is not None:
                    self._idle.append((done, _event()))
                on_device = batch if self.inputs is not None else batch.to(self.device, non_blocking=cuda)
                if done is None:
                    self._waited += time.monotonic() - asked
                yield batch.clips, on_device

    def testing(self, clips: np.ndarray, *, batch_size: int) -> Iterator[Batch]:
        """The test view of `clips` [N], in table order."""
        yield from self._dataset.batches(clips, batch_size=batch_size, training=False, **self._options)


def _event() -> torch.cuda.Event:
    """When a GPU is done with what it was given."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
