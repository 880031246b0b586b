"""The HDF5 cache of trunk outputs: schema, recipe and fingerprint, crash-safe writer.

`cache/<dataset>/<modality>-<fingerprint>/` holds

- `shard-NNNNN.h5`: groups `train` and `test` (the two may differ in crop, so in shape), each with `part0`, `part1`, ...
  [R, ...] (one per path of the encoder), `clip` [R] (row of the clip table) and `view` [R] (training view from 0, or
  -1 for the test view); `rejected/` (clip, modality, file, cause, remedy) and `mended/` (clip, note). Uncompressed
  parts are contiguous, so that a reader can map them; compressed ones are chunked by row. int8 parts have
  `part0_scale`, ... [R, C] beside them (`data.quantise`). `part0_sum`, ... [R] are the checksums of a part's rows.
- `index.h5`: the clip table, the row table, the rejected clips, the provenance and the checksums of all other files;
  written last, so that its presence means the cache is complete.
- `tail.pt`: initial weights of the tail, where the trunk is not empty; `trunk.pt`: the trunk's, where no training view
  is stored (`cache.views = 0`), so that `train` runs it; the index then holds where the media lie.

A shard covers a fixed run of clips, is written aside, synced and renamed; what is complete is never computed again.
Letters: N clips, R rows (clip x view), V views.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np

from mbcd_cli import __version__, checksums
from mbcd_cli.data.clips import AT_ONCE, Clips, Digest, chunks
from mbcd_cli.data.media.condition import condition, holding
from mbcd_cli.data.modalities.modality import Modality, each_file
from mbcd_cli.data.records import TEST_VIEW, Mended, Rejected
from mbcd_cli.data.rounding import Rounding
from mbcd_cli.errors import FOREIGN, CacheError
from mbcd_cli.files import open_hdf5, written_hdf5
from mbcd_cli.settings import Settings, fields_for

FORMAT = 3
SHARD_BYTES = 512 * 2**20
"""A shard holds at most about this much, so that memory stays bounded while one is being filled."""
SHARD_CLIPS, FEW_CLIPS, LEAST_BYTES = 64, 64 * 64, 2**20
"""Clips of a shard; in datasets of more than a few as many more as have so many bytes: many small files are slow."""
_TEXT = h5py.string_dtype("utf-8")
AnyRecord = TypeVar("AnyRecord", Rejected, Mended)


def recipe_of(settings: Settings, name: str, modality: Modality, *, weights_sha256: str | None) -> dict[str, object]:
    """All that fixes the cached bytes of one modality, but for the clips themselves.

    Args:
        settings: the whole tree; the dataset's and the cache's slices are read.
        name: the modality.
        modality: its resolved settings.
        weights_sha256: of the encoder's weights; None for random ones.
    """
    # With nothing frozen the cache holds decoded tensors, whatever encoder reads them later.
    view = modality.model_dump(mode="json", include={*fields_for(type(modality), "cache")})
    recipe: dict[str, object] = {"format": FORMAT, "decoder": modality.decoder(), "modality": name, "view": view}
    for group in (settings.dataset, settings.cache):
        recipe |= {key: getattr(group, key) for key in fields_for(type(group), "cache")}
    if settings.cache.views:
        del recipe["trunk_batch_norm"]
    if settings.dataset.leave_out == "none":
        del recipe["leave_out"]
    if modality.prepared_encoder:
        recipe["encoder"] = modality.encoder
        recipe["width"] = modality.width
        if modality.encoder_config is not None:
            recipe["encoder_config"] = modality.encoder_config
        recipe["weights"] = weights_sha256 or "random"
    return recipe


def fingerprint(
    recipe: Mapping[str, object],
    clips: Clips,
    *,
    name: str,
    root: Path,
    seen: Callable[[int], None] = lambda count: None,
) -> str:
    """Twelve hex digits over the recipe, the clips, the size of their media files and the names in folders of frames.

    Paths are taken relative to `root`, so that a dataset that moves keeps its cache.

    Args:
        seen: told of every so many clips whose files have been looked at.
    """
    digest = Digest(json.dumps([recipe, clips.digest], sort_keys=True)[:-1] + ", [")
    relative = lru_cache(maxsize=None)(lambda folder: os.path.relpath(folder or ".", root))
    column = clips.media[name]
    held: dict[str, tuple[str, int | str]] = {}
    for chunk in chunks(column.described()):
        named = dict.fromkeys(file for files, _ in chunk for file in files)
        new = [file for file in named if file not in held]  # a packed array is named by many clips
        paths = [column.path(file) for file in new]
        told = zip((_below(path, relative) for path in paths), each_file(holding, paths), strict=True)
        held = {file: held[file] for file in named if file in held} | dict(zip(new, told, strict=True))
        rows = []
        for files, span in chunk:
            seen_there = [held[file] for file in files]
            rows.append([[path for path, _ in seen_there], [size for _, size in seen_there], span])
        digest.add(rows)
        seen(len(chunk))
    return digest.hexdigest("]]")[:12]


def _below(path: Path, relative: Callable[[str], str]) -> str:
    """A path relative to the root, where `relative` tells its folder's."""
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        return relative(str(path))
    beside = relative(folder)
    return name if beside == "." else f"{beside}/{name}"


def views_of(split: str, *, views: int, test_view: str) -> list[int]:
    """Views stored for a clip of a split: training clips get V random ones; test clips (or all) get the test view."""
    wanted = [TEST_VIEW] if split == "test" or test_view == "all" else []
    return wanted + (list(range(views)) if split == "train" else [])


def shard_ranges(sizes: Sequence[int], *, limit: int | None = None) -> list[range]:
    """Runs of clips, one per shard: at most about `SHARD_BYTES` each.

    Args:
        sizes: bytes of every clip's rows, [N].
        limit: clips per shard, at most; by default `SHARD_CLIPS`, and of many clips with small rows more, until they
            have `LEAST_BYTES`.
    """
    ranges, start, size = [], 0, 0
    least = LEAST_BYTES if limit is None and len(sizes) > FEW_CLIPS else 0
    for index, add in enumerate(sizes):
        full = index - start >= (limit or SHARD_CLIPS) and size >= least
        if index > start and (full or size + add > SHARD_BYTES):
            ranges.append(range(start, index))
            start, size = index, 0
        size += add
    if len(sizes) > start:
        ranges.append(range(start, len(sizes)))
    return ranges


def _write_strings(group: h5py.Group, name: str, values: Sequence[str]) -> None:
    """Of one length: HDF5 keeps texts of any length in a heap, and may search a damaged heap for ever."""
    encoded = [value.encode(errors="surrogateescape") for value in values]
    length = max((len(value) for value in encoded), default=0) or 1
    group.create_dataset(name, data=np.array(encoded, h5py.string_dtype("utf-8", length)))


def _write_records(file: h5py.File, name: str, kind: type[AnyRecord], records: Sequence[AnyRecord]) -> None:
    group = file.create_group(name)
    for column in fields(kind):
        _write_strings(group, column.name, [getattr(record, column.name) for record in records])


def _strings(dataset: h5py.Dataset) -> list[str]:
    return [value.decode(errors="surrogateescape") for value in dataset[()]]


def _read_records(file: h5py.File, name: str, kind: type[AnyRecord]) -> list[AnyRecord]:
    columns = [_strings(file[name][column.name]) for column in fields(kind)]
    return [kind(*row) for row in zip(*columns, strict=True)]


def read_mended(file: h5py.File) -> list[Mended]:
    """The mended clips recorded in a shard or an index."""
    return _read_records(file, "mended", Mended)


def read_rejected(file: h5py.File) -> list[Rejected]:
    """The rejected clips recorded in a shard or an index."""
    return _read_records(file, "rejected", Rejected)


def _write_roundings(file: h5py.File, roundings: Mapping[int, Rounding]) -> None:
    group = file.create_group("roundings")
    for part, rounding in roundings.items():
        sums = group.create_dataset(str(part), data=rounding.sums)
        sums.attrs["count"], sums.attrs["whole"] = rounding.count, rounding.whole


def _read_roundings(file: h5py.File) -> dict[int, Rounding]:
    return {
        int(part): Rounding(sums[()], int(sums.attrs["count"]), bool(sums.attrs["whole"]))
        for part, sums in file["roundings"].items()
    }


def shard_path(folder: Path, number: int) -> Path:
    """Path of shard `number`."""
    return folder / f"shard-{number:05d}.h5"


def is_done(folder: Path, number: int, span: range, clips: Clips, name: str) -> bool:
    """Whether a shard is there, readable, of these clips, and the media of those that were not whole are unchanged."""
    try:
        with open_hdf5(shard_path(folder, number), walk=False) as file:  # of thousands, and no row is read
            if (file.attrs["first"], file.attrs["stop"]) != (span.start, span.stop):
                return False
            conditions = json.loads(file.attrs["conditions"])
            return conditions == _conditions(clips, span, name, read_rejected(file), read_mended(file))
    except (OSError, RuntimeError, *FOREIGN):
        return False


def _conditions(
    clips: Clips, span: range, name: str, rejected: Sequence[Rejected], mended: Sequence[Mended]
) -> dict[str, str]:
    """What a shard's clips that were not whole were like, and who found that: another version tries them again."""
    doubtful = {record.clip for record in (*rejected, *mended)}
    if not doubtful:
        return {}
    media = {clips.ids[i]: condition(clips.media[name][i]) for i in span if clips.ids[i] in doubtful}
    return {"": f"mbcd {__version__}", **media}


def root_checksum(recipe: Mapping[str, object], clips: Clips, files: Mapping[str, str]) -> str:
    """One checksum over a cache: its recipe, its clips and every stored byte; when it was prepared plays no part."""
    return checksums.of_text(json.dumps([recipe, clips.digest, files], sort_keys=True))


GROUPS = ("train", "test")


def group_of(view: int) -> str:
    """Group of a shard that holds `view`."""
    return "test" if view == TEST_VIEW else "train"


@dataclass(slots=True)
class Rows:
    """Rows of one group: parts [R, ...] each, the clip and view of every row, scales [R, C] of int8 parts."""

    parts: list[np.ndarray]
    clips: np.ndarray
    views: np.ndarray
    scales: list[np.ndarray | None]

    def sums(self, part: int) -> np.ndarray:
        """Checksum of every row of a part, with its scales, [R] uint64."""
        rows, scales = self.parts[part], self.scales[part]
        whose = zip(self.clips, self.views, strict=True)
        return np.array(
            [
                checksums.of_row(rows[at], *([] if scales is None else [scales[at]]), clip=int(clip), view=int(view))
                for at, (clip, view) in enumerate(whose)
            ],
            np.uint64,
        )


@dataclass(slots=True)
class Shard:
    """What one shard holds: rows per group, the clips that were rejected, and those that were mended.

    `errors` has per part the sums of squared int8 errors and of squared values; zeros where nothing is rounded to int8.
    `roundings` has what float16 takes from arrays and trunk outputs, by part.
    """

    rows: dict[str, Rows]
    rejected: list[Rejected]
    mended: list[Mended]
    errors: list[list[float]] = field(default_factory=list)
    roundings: dict[int, Rounding] = field(default_factory=dict)


@dataclass(slots=True)
class Finished:
    """What all shards together report.

    Attributes:
        rejected, mended: as in `Shard`.
        error: root of the mean squared int8 error relative to that of the values; None where nothing is int8.
        lost: what float16 took from the values, in words; empty where that is next to nothing.
    """

    rejected: list[Rejected]
    mended: list[Mended]
    error: float | None
    lost: str = ""


class CacheWriter:
    """Writes one modality's cache, shard by shard; a second run finds what is there and goes on.

    Args:
        folder: `cache/<dataset>/<modality>-<fingerprint>`.
        recipe: what fixes the bytes.
        modality: resolved settings, kept so that training can rebuild the tail.
        clips: the dataset's clip table, in order.
        shards: runs of clips.
        provenance: reader, dataset, root, weights and the like, as readable attributes.
        compression: "none", "gzip" or "lzf".
        passport: of the encoder, as JSON; none where nothing of it is frozen.
        online: JSON of the `data.online.MediaSource` that `train` decodes training views from; None where they are
            stored.
    """

    def __init__(
        self,
        folder: Path,
        *,
        recipe: Mapping[str, object],
        modality: Modality,
        clips: Clips,
        shards: Sequence[range],
        domains: Sequence[str],
        label_names: Sequence[str],
        provenance: Mapping[str, str],
        compression: str,
        online: str | None = None,
        passport: str | None = None,
    ) -> None:
        self.folder = folder
        self.passport = passport
        self.online = online
        self.recipe = recipe
        self.modality = modality
        self.clips = clips
        self.shards = shards
        self.domains = domains
        self.label_names = label_names
        self.provenance = provenance
        self.compression = None if compression == "none" else compression

    def shard_path(self, number: int) -> Path:
        """Path of shard `number`."""
        return shard_path(self.folder, number)

    def pending(self) -> list[int]:
        """Shards that are not there yet, or not to be used again (`is_done`); the latter are written anew."""
        return [number for number in range(len(self.shards)) if not self.is_done(number)]

    def is_done(self, number: int) -> bool:
        """Whether a shard is there, and to be used again."""
        return is_done(self.folder, number, self.shards[number], self.clips, self.recipe["modality"])

    def write_shard(self, number: int, shard: Shard) -> None:
        """Store one shard; it exists whole or not at all.

        Raises:
            FileError: full disk or missing rights; what was written before stays.
        """
        goes_on = "run the same command again: it goes on after the shards that are done"
        with written_hdf5(self.shard_path(number), libver="latest", place="--cache-dir", then=goes_on) as file:
            file.attrs["format"] = FORMAT
            file.attrs["first"], file.attrs["stop"] = self.shards[number].start, self.shards[number].stop
            file.attrs["modality"] = self.recipe["modality"]
            for name, rows in shard.rows.items():
                group = file.create_group(name)
                group.attrs["parts"] = len(rows.parts)
                for index, (part, scale) in enumerate(zip(rows.parts, rows.scales, strict=True)):
                    if scale is not None:
                        group.create_dataset(f"part{index}_scale", data=scale)
                    chunks = (1, *part.shape[1:]) if self.compression and len(part) else None
                    group.create_dataset(
                        f"part{index}", data=part, chunks=chunks, compression=self.compression if chunks else None
                    )
                    group.create_dataset(f"part{index}_sum", data=rows.sums(index))
                group.create_dataset("clip", data=rows.clips.astype(np.int32))
                group.create_dataset("view", data=rows.views.astype(np.int16))
            file.attrs["errors"] = np.asarray(shard.errors, np.float64)
            _write_roundings(file, shard.roundings)
            name = self.recipe["modality"]
            conditions = _conditions(self.clips, self.shards[number], name, shard.rejected, shard.mended)
            file.attrs["conditions"] = np.bytes_(json.dumps(conditions))  # see `_write_strings`
            _write_records(file, "rejected", Rejected, shard.rejected)
            _write_records(file, "mended", Mended, shard.mended)

    def finish(self, unlisted: Sequence[Rejected] = (), *, settings: str = "") -> Finished:
        """Write the index over all shards; return what they report.

        Args:
            unlisted: clips that the reader already rejected; recorded beside the others.
            settings: those it was prepared with, as TOML.

        Raises:
            CacheError: a shard is missing or unreadable.
            FileError: full disk or missing rights.
        """
        columns: dict[str, list[np.ndarray]] = {"clip": [], "view": [], "shard": [], "row": []}
        files = {file.name: checksums.checksum(file) for file in sorted(self.folder.glob("*.pt"))}
        rejected: list[Rejected] = []
        mended: list[Mended] = []
        errors = np.zeros(2)
        roundings: dict[int, Rounding] = {}
        for number in range(len(self.shards)):
            path = self.shard_path(number)
            try:
                files[path.name] = checksums.checksum(path)
                with open_hdf5(path) as file:
                    for name in GROUPS:
                        count = len(file[f"{name}/clip"])
                        for column, dtype in (("clip", np.int32), ("view", np.int16)):
                            values = file[f"{name}/{column}"][()].astype(dtype, casting="safe")
                            if values.shape != (count,):
                                raise ValueError(f"its {column}s are no list of {count}")
                            columns[column].append(values)
                        columns["shard"].append(np.full(count, number, np.int32))
                        columns["row"].append(np.arange(count, dtype=np.int32))
                    rejected.extend(read_rejected(file))
                    mended.extend(read_mended(file))
                    if "errors" in file.attrs:
                        errors += np.asarray(file.attrs["errors"]).reshape(-1, 2).sum(axis=0)
                    for part, rounding in _read_roundings(file).items():
                        roundings[part] = roundings.get(part, Rounding()) + rounding
            except (OSError, RuntimeError, *FOREIGN) as error:
                raise CacheError(f"Shard {path} cannot be read: {error}.", "Delete it and prepare again.") from error
        lost = "; ".join(filter(None, map(str, roundings.values())))
        with written_hdf5(self.folder / "index.h5", libver="latest", place="--cache-dir") as file:
            file.attrs["format"] = FORMAT
            file.attrs["recipe"] = json.dumps(self.recipe, sort_keys=True)
            file.attrs["modality_settings"] = self.modality.model_dump_json()
            file.attrs["listing"] = self.clips.digest
            file.attrs["prepared_at"] = datetime.now(UTC).isoformat()
            file.attrs["mbcd_version"] = __version__
            file.attrs["float16_loss"] = lost
            file.attrs["errors"] = errors
            file.attrs["root_checksum"] = root_checksum(self.recipe, self.clips, files)
            for key, value in self.provenance.items():
                file.attrs[key] = str(value)
            if self.online is not None:
                file.create_dataset("online", data=self.online, dtype=_TEXT)
            if self.passport is not None:
                file.create_dataset("passport", data=self.passport, dtype=_TEXT)
            file.create_dataset("settings", data=settings, dtype=_TEXT)
            if (beside := self.folder / checksums.PREPARED_WITH).exists():  # paths are in it: no part of the root
                file.attrs["prepared_with"] = checksums.checksum(beside)
            file.create_dataset("files", data=json.dumps(files), dtype=_TEXT)
            _write_strings(file, "domains", self.domains)
            _write_strings(file, "label_names", self.label_names)
            table = file.create_group("clips")
            ids = table.create_dataset("id", (len(self.clips),), _TEXT)
            for first in range(0, len(ids), AT_ONCE):
                ids[first : first + AT_ONCE] = self.clips.ids[first : first + AT_ONCE]
            number = {name: index for index, name in enumerate(self.domains)}
            domains = np.array([number[name] for name in self.clips.domain_names], np.int32)
            table.create_dataset("domain", data=domains[self.clips.domains])
            table.create_dataset("split", data=self.clips.splits)
            table.create_dataset("label", data=self.clips.labels)
            # No part of the fingerprint: whoever prepares again with another column `group` has it at once.
            table.create_dataset("recording", data=self.clips.recordings)
            rows = file.create_group("rows")
            for key, values in columns.items():
                rows.create_dataset(key, data=np.concatenate(values))
            _write_records(file, "rejected", Rejected, [*unlisted, *rejected])
            _write_records(file, "mended", Mended, mended)
        for path in self.folder.glob("shard-*.h5"):  # of a time when shards held fewer clips
            if path.name not in files:
                path.unlink()
        return Finished(rejected, mended, _error(errors), lost)

    def finished(self, unlisted: Sequence[Rejected] = ()) -> Finished:
        """What `finish` returned to another process, which wrote the index."""
        with open_hdf5(self.folder / "index.h5") as file:
            already = {(bad.clip, bad.modality) for bad in unlisted}
            rejected = [bad for bad in read_rejected(file) if (bad.clip, bad.modality) not in already]
            return Finished(rejected, read_mended(file), _error(file.attrs["errors"]), str(file.attrs["float16_loss"]))


def _error(sums: np.ndarray) -> float | None:
    """Of the sums of squared errors and of squared values."""
    return float(np.sqrt(sums[0] / sums[1])) if sums[1] else None
