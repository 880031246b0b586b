"""Filling a cache: decode, run the frozen trunk, collect rows, write shards; the three overlap.

While one shard is written (and synced) by a thread, the next is decoded by the workers and run through the trunk.
Letters: R rows (clip x view), N clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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


_View = tuple[int, int, tuple[np.ndarray, ...]]
"""Of a clip by its index, a view by its number: its parts."""


@dataclass(frozen=True, slots=True)
class _Output:
    """A part of what a trunk made of R views, in main memory.

    Attributes:
        values: in the cache's type, [R, ...]; in float32 where that is int8.
        extremes: the least and the largest of them, nan where any is: a tenth of isfinite's time.
        first: of the first view, in float32.
    """

    values: torch.Tensor
    extremes: torch.Tensor
    first: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Outputs:
    """All parts, which a GPU may be at work on still.

    They are converted and copied behind the trunk's own kernels: whoever asks for them waits for these, and not for
    what the GPU was given since.
    """

    parts: list[_Output]
    made: torch.cuda.Event | None

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor], dtypes: Sequence[np.dtype]) -> _Outputs:
        """Parts [R, ...] on their device, and the cache's types."""
        brought, waited = [], parts[0].device.type == "cuda"  # others say nothing of when a copy has ended
        for part, dtype in zip(parts, dtypes, strict=True):
            values = part.to(torch.float32 if dtype == np.int8 else getattr(torch, dtype.name))
            three = values, torch.stack(values.aminmax()), part[:1].float()
            brought.append(_Output(*(one.to("cpu", non_blocking=waited) for one in three)))
        if not waited:
            return cls(brought, None)
        made = torch.cuda.Event(blocking=True)
        made.record()
        return cls(brought, made)

    def waited_for(self) -> list[_Output]:
        """They are there."""
        if self.made is not None:
            self.made.synchronize()
        return self.parts


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
        waiting: dict[str, list[_View]] = {group: [] for group in GROUPS}
        limits = {group: self._together(group) for group in GROUPS}
        at_work: list[Callable[[], None]] = []

        def land() -> None:
            while at_work:
                at_work.pop()()

        def flush(group: str) -> None:
            if waiting[group]:
                made = self._through(waiting[group], group)
                land()  # what came before, while a GPU is at work on these
                at_work.append(partial(self._store, shard, group, filled[group], waiting[group], made))
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
        land()
        for group in GROUPS:
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

    def _through(self, views: Sequence[_View], group: str) -> list[np.ndarray] | _Outputs:
        """What the trunk makes of some views; without one, the views."""
        columns = list(zip(*(parts for _, _, parts in views), strict=True))
        if not self.trunk.names:
            return [column[0][None] if len(column) == 1 else np.stack(column) for column in columns]
        inputs = []
        for column in columns:
            dtype = torch.from_numpy(column[0][:0]).dtype
            shape = (len(column), *column[0].shape)
            staged = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
            np.stack(column, out=staged.numpy())
            inputs.append(staged.to(self.device, non_blocking=self.device.type == "cuda"))
        return _Outputs.of(self.trunk(tuple(inputs)), [dtype for _, dtype in self.shapes[group]])

    def _store(
        self,
        shard: Shard,
        group: str,
        first: int,
        views: Sequence[_View],
        made: list[np.ndarray] | _Outputs,
    ) -> None:
        """Put what was made of some views into rows `first`, ... of a group."""
        rows = shard.rows[group]
        at = slice(first, first + len(views))
        outputs = made.waited_for() if isinstance(made, _Outputs) else None
        for number, (target, source) in enumerate(zip(rows.parts, outputs or made, strict=True)):
            if target.dtype == np.int8:
                source = source.values.numpy() if outputs else source
                finite = np.isfinite(source).reshape(len(source), -1).all(axis=1)
                if finite.all():
                    target[at], rows.scales[number][at] = quantise(source)
                    for k, value in enumerate(squared_error(source, target[at], rows.scales[number][at])):
                        shard.errors[number][k] += value
            elif outputs:
                target[at] = source.values.numpy()
                finite = np.ones(len(views), bool)
                if not source.extremes.isfinite().all():
                    finite = np.isfinite(target[at]).reshape(len(views), -1).all(axis=1)
                elif target.dtype == np.float16:
                    # Columns are channels; one row of those that went through together tells enough.
                    its = source.first.numpy()
                    self._note_rounding(shard, number, np.moveaxis(its, 1, -1), np.moveaxis(target[at][:1], 1, -1))
            else:
                with np.errstate(over="ignore"):
                    target[at] = source
                finite = np.ones(len(source), bool)
                if target.dtype.kind == "f":
                    finite = np.isfinite(target[at]).reshape(len(source), -1).all(axis=1)
                if finite.all() and target.dtype == np.float16 and self.writer.modality.raw:
                    self._note_rounding(shard, number, source, target[at])  # spectrograms have nothing to lose
            if not finite.all():
                names = ", ".join(dict.fromkeys(self.clips.ids[views[row][0]] for row in np.flatnonzero(~finite)))
                raise CacheError(
                    f"Clip {names}: values do not fit {target.dtype}.", "Prepare with --set cache.dtype=float32."
                )
        rows.clips[at] = [index for index, _, _ in views]
        rows.views[at] = [view for _, view, _ in views]

    def _note_rounding(self, shard: Shard, number: int, source: np.ndarray, stored: np.ndarray) -> None:
        """Collects what float16 takes from part `number`, [V, ..., C]."""
        shape = (len(source), -1, source.shape[-1])
        shard.roundings.setdefault(number, Rounding()).add(source.reshape(shape), stored.reshape(shape))
