"""Filling a cache: decode, run the frozen trunk, collect rows, write shards; the three overlap.

While one shard is written (and synced) by a thread, the next is decoded by the workers and run through the trunk.
Letters: R rows (clip x view), N clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, tee

import numpy as np
import torch

from mbcd_cli.data.cache import GROUPS, CacheWriter, Rows, Shard, group_of
from mbcd_cli.data.clips import Clips
from mbcd_cli.data.media.decoding import Decoder
from mbcd_cli.data.quantise import quantise, scale_shape, squared_error
from mbcd_cli.data.records import Decoded, Mended
from mbcd_cli.data.rounding import Rounding
from mbcd_cli.encoders.staged import TOGETHER, Trunk
from mbcd_cli.errors import CacheError
from mbcd_cli.preparation.trunk import Shapes, row_bytes
from mbcd_cli.say import Ticker

_SMALL, _SMALL_TOGETHER = 4096, 256
"""Bytes of a row that costs less to copy than to be spoken of, and how many of those are stored at once: one at a time
preparing 8,000 clips of two vectors took 1.8 times as long (median of three in turns, on a busy machine)."""


@dataclass(slots=True)
class Filler:
    """Fills shards of one modality.

    Attributes:
        writer: of the cache.
        decoder: decodes its clips.
        clips: all clips of the dataset. views: those stored of a clip, by its split.
        trunk: the frozen stages, on `device`.
        shapes: of a row, per group.
        tries: whether clips of which nothing is stored are decoded all the same: bad files come to light now, not in
            training.
    """

    writer: CacheWriter
    decoder: Decoder
    clips: Clips
    views: Sequence[list[int]]
    trunk: Trunk
    shapes: dict[str, Shapes]
    device: torch.device
    tries: bool = True

    def run(self, numbers: Iterable[int], ticker: Ticker, *, done: Callable[[int], None] = lambda number: None) -> None:
        """Fill the shards `numbers`, each of which is asked for as late as can be.

        Args:
            done: told of a shard that is written.

        Raises:
            CacheError: a full disk, or values that the type cannot hold.
        """
        ahead, numbers = tee(numbers)
        stream = self.decoder.run((i, self.clips[i], self._views(i) or [0]) for n in ahead for i in self.decoded(n))
        writing: Future[None] | None = None

        def write(number: int, shard: Shard) -> None:
            self.writer.write_shard(number, shard)
            done(number)

        with ThreadPoolExecutor(1, thread_name_prefix="mbcd-write") as pool:
            for number in numbers:
                shard = self._fill(self.decoded(number), stream, ticker)
                if writing is not None:
                    writing.result()
                writing = pool.submit(write, number, shard)
            if writing is not None:
                writing.result()

    def decoded(self, number: int) -> Sequence[int]:
        """The clips of a shard that are decoded."""
        return [i for i in self.writer.shards[number] if self.tries or self._views(i)]

    def _views(self, index: int) -> list[int]:
        return self.views[self.clips.splits[index]]

    def _fill(self, span: Sequence[int], stream: Iterator[Decoded], ticker: Ticker) -> Shard:
        """Collect the rows of one shard's clips."""
        rows = {}
        for group in GROUPS:
            count = sum(group_of(view) == group for index in span for view in self._views(index))
            parts = [np.empty((count, *shape), dtype) for shape, dtype in self.shapes[group]]
            scales = [
                np.empty((count, *scale_shape(shape)), np.float32) if dtype == np.int8 else None
                for shape, dtype in self.shapes[group]
            ]
            rows[group] = Rows(parts, np.empty(count, np.int32), np.empty(count, np.int16), scales)
        shard = Shard(rows, [], [], errors=[[0.0, 0.0] for _ in self.shapes["train"]])
        filled = dict.fromkeys(GROUPS, 0)
        waiting: dict[str, list[tuple[int, int, tuple[np.ndarray, ...]]]] = {group: [] for group in GROUPS}
        limits = {group: self._together(group) for group in GROUPS}

        def flush(group: str) -> None:
            if waiting[group]:
                self._store(shard, group, filled[group], waiting[group])
                filled[group] += len(waiting[group])
                waiting[group] = []

        for decoded in islice(stream, len(span)):
            ticker.advance()
            if decoded.rejected is not None:
                shard.rejected.append(decoded.rejected)
                continue
            shard.mended.extend(Mended(self.clips.ids[decoded.index], note) for note in decoded.notes)
            if not self._views(decoded.index):
                continue
            for view, parts in zip(decoded.views, decoded.parts, strict=True):
                waiting[group_of(view)].append((decoded.index, view, parts))
            for group in GROUPS:
                if len(waiting[group]) >= limits[group]:
                    flush(group)
        for group in GROUPS:
            flush(group)
            full, count = rows[group], filled[group]
            rows[group] = Rows(
                [part[:count] for part in full.parts],
                full.clips[:count],
                full.views[:count],
                [None if scale is None else scale[:count] for scale in full.scales],
            )
        return shard

    def _together(self, group: str) -> int:
        """Views that are stored at once: a CPU's trunk gains nothing from more than one, copying small rows does."""
        if self.trunk.names:
            return TOGETHER if self.device.type == "cuda" else 1
        return _SMALL_TOGETHER if row_bytes(self.shapes[group]) <= _SMALL else 1

    def _store(
        self, shard: Shard, group: str, first: int, views: list[tuple[int, int, tuple[np.ndarray, ...]]]
    ) -> None:
        """Run the trunk on some views and put what comes out into rows `first`, ... of a group."""
        rows = shard.rows[group]
        columns = zip(*(parts for _, _, parts in views), strict=True)
        stacked = [column[0][None] if len(column) == 1 else np.stack(column) for column in columns]
        if self.trunk.names:
            tensors = tuple(torch.from_numpy(array).to(self.device) for array in stacked)
            stacked = [part.float().cpu().numpy() for part in self.trunk(tensors)]
        at = slice(first, first + len(views))
        for number, (target, source) in enumerate(zip(rows.parts, stacked, strict=True)):
            if target.dtype == np.int8:
                finite = np.isfinite(source)
                if finite.all():
                    target[at], rows.scales[number][at] = quantise(source)
                    for k, value in enumerate(squared_error(source, target[at], rows.scales[number][at])):
                        shard.errors[number][k] += value
            else:
                with np.errstate(over="ignore"):
                    target[at] = source
                finite = np.isfinite(target[at]) if target.dtype.kind == "f" else np.ones(len(views), bool)
                if finite.all() and target.dtype == np.float16:
                    self._note_rounding(shard, number, source, target[at])
            if not finite.all():
                bad = np.flatnonzero(~finite.reshape(len(views), -1).all(axis=1))
                names = ", ".join(dict.fromkeys(self.clips.ids[views[row][0]] for row in bad))
                raise CacheError(
                    f"Clip {names}: values do not fit {target.dtype}.", "Prepare with --set cache.dtype=float32."
                )
        rows.clips[at] = [index for index, _, _ in views]
        rows.views[at] = [view for _, view, _ in views]

    def _note_rounding(self, shard: Shard, number: int, source: np.ndarray, stored: np.ndarray) -> None:
        """Collects what float16 takes from part `number`; spectrograms are standardised, and have nothing to lose."""
        if self.trunk.names:  # the columns are channels; one row of those that went through together tells enough
            source, stored = (np.moveaxis(rows[:1], 1, -1) for rows in (source, stored))
        elif not self.writer.modality.raw:
            return
        shape = (len(source), -1, source.shape[-1])
        shard.roundings.setdefault(number, Rounding()).add(source.reshape(shape), stored.reshape(shape))
