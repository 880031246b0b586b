"""Filling a cache: decode, run the frozen trunk, collect rows, write shards; the three overlap.

While one shard is written (and synced) by a thread, the next is decoded by the workers and run through the trunk.
Letters: R rows (clip x view), N clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mbcd_cli import console
from mbcd_cli.data.cache import GROUPS, CacheWriter, Rows, Shard, group_of
from mbcd_cli.data.media.decoding import Decoded, Decoder
from mbcd_cli.data.modalities.base import Modality
from mbcd_cli.data.quantise import quantise, scale_shape, squared_error
from mbcd_cli.data.records import Clip
from mbcd_cli.data.rounding import Rounding
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.pretrained import find_weights, load_pretrained
from mbcd_cli.encoders.staged import TOGETHER, Trunk
from mbcd_cli.errors import CacheError
from mbcd_cli.files import written
from mbcd_cli.settings import Settings

Shapes = list[tuple[tuple[int, ...], np.dtype]]


def needs_weights(settings: Settings, modality: Modality) -> bool:
    """Whether a weights file has to be there: nothing is frozen at the cut `input`, and random weights may be said."""
    return not (settings.cache.random_weights or (modality.cut == "input" and modality.weights is None))


@dataclass(frozen=True, slots=True)
class Frozen:
    """What `prepare` runs and keeps of an encoder.

    Attributes:
        trunk: the stages whose outputs are cached; none where decoded views are.
        weights: file in the cache folder -> state dict that `train` begins with; none where it draws its own.
        sha256: of the pretrained weights, None for random ones.
    """

    trunk: Trunk
    weights: dict[str, dict[str, torch.Tensor]]
    sha256: str | None


def build_trunk(settings: Settings, name: str, modality: Modality) -> Frozen:
    """The encoder of `modality`, with its weights, cut.

    Raises:
        CheckpointError: weights that are missing, damaged or another encoder's; a trunk is never silently random.
    """
    torch.manual_seed(settings.cache.seed)
    encoder = build_encoder(name, modality)
    cut = encoder.cut(modality.cut)
    if modality.cut == "input" and modality.weights is None:
        return Frozen(cut[0], {}, None)
    sha = None
    if needs_weights(settings, modality):
        file = find_weights(modality.encoder, modality.weights, settings.cache.weights_dir)
        sha = load_pretrained(encoder, modality.encoder, file, sha256=modality.weights_sha256).sha256
        console.say(f"{name}: {modality.encoder} with the weights of {file} (SHA-256 {sha[:8]}...)")
    if settings.cache.live_trunks:
        cut = encoder.cut(modality.cut, live=True)
    weights = {"tail.pt": cut[1].state_dict()}
    if settings.cache.views == 0:
        weights["trunk.pt"] = cut[0].state_dict()
    return Frozen(Trunk({}) if settings.cache.live_trunks else cut[0], weights, sha)


def meta_inputs(modality: Modality, group: str) -> tuple[torch.Tensor, ...]:
    """A view of one clip in shape only."""
    inputs = modality.part_shapes(test=group == "test")
    return tuple(
        torch.empty((1, *shape), dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device="meta")
        for shape, dtype in inputs
    )


def meta_trunk(settings: Settings, name: str, modality: Modality) -> Trunk:
    """The trunk that `prepare` runs, in shape only: no memory, no weights, instant."""
    if settings.cache.live_trunks:
        return Trunk({})
    with torch.device("meta"):
        return build_encoder(name, modality).cut(modality.cut)[0]


def cached_shapes(name: str, modality: Modality, settings: Settings, group: str) -> Shapes:
    """Shape and stored dtype of one row of every part at the cut; nothing is computed."""
    stored = np.dtype(settings.cache.dtype)
    trunk = meta_trunk(settings, name, modality)
    if not trunk.names:
        inputs = modality.part_shapes(test=group == "test")
        return [(shape, dtype if dtype.kind in "iu" else stored) for shape, dtype in inputs]
    return [(tuple(part.shape[1:]), stored) for part in trunk(meta_inputs(modality, group))]


def row_bytes(shapes: Shapes) -> int:
    """Bytes of one row, its scales included."""
    return sum(
        int(np.prod(shape)) * dtype.itemsize + (int(np.prod(scale_shape(shape))) * 4 if dtype == np.int8 else 0)
        for shape, dtype in shapes
    )


@dataclass(slots=True)
class Filler:
    """Fills shards of one modality.

    Attributes:
        writer: of the cache.
        decoder: decodes its clips.
        clips, views: all clips of the dataset, and the views stored of each (none: only tried).
        trunk: the frozen stages, on `device`.
        shapes: of a row, per group.
        roundings: what float16 takes from arrays and trunk outputs, per part.
    """

    writer: CacheWriter
    decoder: Decoder
    clips: Sequence[Clip]
    views: Sequence[list[int]]
    trunk: Trunk
    shapes: dict[str, Shapes]
    device: torch.device
    roundings: dict[int, Rounding] = field(default_factory=dict)

    def run(self, numbers: Sequence[int], ticker: console.Ticker) -> None:
        """Fill the shards `numbers`.

        Raises:
            CacheError: a full disk, or values that the type cannot hold.
        """
        # A clip of which nothing is stored is decoded all the same: bad files come to light now, not in training.
        items = [(i, self.clips[i], self.views[i] or [0]) for n in numbers for i in self.writer.shards[n]]
        stream = self.decoder.run(items)
        writing: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="mbcd-write") as pool:
            for number in numbers:
                shard = self._fill(self.writer.shards[number], stream, ticker)
                if writing is not None:
                    writing.result()
                writing = pool.submit(self.writer.write_shard, number, shard)
            if writing is not None:
                writing.result()

    def _fill(self, span: range, stream: Iterator[Decoded], ticker: console.Ticker) -> Shard:
        """Collect the rows of one shard's clips."""
        rows = {}
        for group in GROUPS:
            count = sum(group_of(view) == group for index in span for view in self.views[index])
            parts = [np.empty((count, *shape), dtype) for shape, dtype in self.shapes[group]]
            scales = [
                np.empty((count, *scale_shape(shape)), np.float32) if dtype == np.int8 else None
                for shape, dtype in self.shapes[group]
            ]
            rows[group] = Rows(parts, np.empty(count, np.int32), np.empty(count, np.int16), scales)
        shard = Shard(rows, [], [], errors=[[0.0, 0.0] for _ in self.shapes["train"]])
        filled = dict.fromkeys(GROUPS, 0)
        waiting: dict[str, list[tuple[int, int, tuple[np.ndarray, ...]]]] = {group: [] for group in GROUPS}
        # A CPU gains nothing from more than one clip's views at once.
        limit = TOGETHER if self.trunk.names and self.device.type == "cuda" else 1

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
            shard.mended.extend((self.clips[decoded.index].id, note) for note in decoded.notes)
            if not self.views[decoded.index]:
                continue
            for view, parts in zip(decoded.views, decoded.parts, strict=True):
                waiting[group_of(view)].append((decoded.index, view, parts))
            for group in GROUPS:
                if len(waiting[group]) >= limit:
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

    def _store(
        self, shard: Shard, group: str, first: int, found: list[tuple[int, int, tuple[np.ndarray, ...]]]
    ) -> None:
        """Run the trunk on some views and put what comes out into rows `first`, ... of a group."""
        rows = shard.rows[group]
        columns = zip(*(parts for _, _, parts in found), strict=True)
        stacked = [column[0][None] if len(column) == 1 else np.stack(column) for column in columns]
        if self.trunk.names:
            tensors = tuple(torch.from_numpy(array).to(self.device) for array in stacked)
            stacked = [part.float().cpu().numpy() for part in self.trunk(tensors)]
        at = slice(first, first + len(found))
        for number, (target, source) in enumerate(zip(rows.parts, stacked, strict=True)):
            if target.dtype == np.int8:
                finite = np.isfinite(source).all()
                if finite:
                    target[at], rows.scales[number][at] = quantise(source)
                    for k, value in enumerate(squared_error(source, target[at], rows.scales[number][at])):
                        shard.errors[number][k] += value
            else:
                with np.errstate(over="ignore"):
                    target[at] = source
                finite = target.dtype.kind != "f" or np.isfinite(target[at]).all()
                if finite and target.dtype == np.float16:
                    self._note_rounding(number, source, target[at])
            if not finite:
                names = ", ".join(dict.fromkeys(self.clips[index].id for index, _, _ in found))
                raise CacheError(
                    f"Clip {names}: values do not fit {target.dtype}.", "Prepare with --set cache.dtype=float32."
                )
        rows.clips[at] = [index for index, _, _ in found]
        rows.views[at] = [view for _, view, _ in found]

    def _note_rounding(self, number: int, source: np.ndarray, stored: np.ndarray) -> None:
        """Collects what float16 takes from part `number`; spectrograms are standardised, and have nothing to lose."""
        if self.trunk.names:  # the columns are channels; one row of those that went through together tells enough
            source, stored = (np.moveaxis(rows[:1], 1, -1) for rows in (source, stored))
        elif not self.writer.modality.raw:
            return
        columns = source.shape[-1]
        self.roundings.setdefault(number, Rounding()).add(source.reshape(-1, columns), stored.reshape(-1, columns))


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a state dict, whole or not at all (`files.written`)."""
    with written(path, place="--cache-dir") as aside, aside.open("wb") as file:
        torch.save({key: value.cpu() for key, value in weights.items()}, file)


def weights_bytes(settings: Settings, name: str, modality: Modality) -> int:
    """About what `save_weights` will write of a modality's encoder."""
    if modality.cut == "input" and modality.weights is None:
        return 0
    with torch.device("meta"):
        trunk, tail = build_encoder(name, modality).cut(modality.cut, live=settings.cache.live_trunks)
    kept = [tail, trunk] if settings.cache.views == 0 else [tail]
    return sum(value.numel() * value.element_size() for part in kept for value in part.state_dict().values())
