"""Reading one modality's cache: its index, and rows mapped from the shards.

Letters: N clips, B clips in a batch, R rows, C channels, V stored training views.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from mbcd_cli import checksums
from mbcd_cli.data.cache import FORMAT, group_of, read_rejected, shard_path
from mbcd_cli.data.clips import AT_ONCE, Texts
from mbcd_cli.data.corruptions import Corruption
from mbcd_cli.data.modalities import AnyKind
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.quantise import restore, scale_shape
from mbcd_cli.data.records import SPLITS, TEST_VIEW
from mbcd_cli.errors import FOREIGN, CacheError, lines_of
from mbcd_cli.files import open_hdf5

Verify = Literal["first", "always", "off"]
_MODALITY = TypeAdapter(AnyKind)


class ClipTable:
    """The clips of a dataset, as columns.

    Attributes:
        domains, splits, labels: [N] int64: domain (index), split (0 train, 1 test) and label.
        recordings: [N] int64, the first clip of the recording that a clip is a part of; itself where nothing tells.

    Args:
        index: the cache's index, open; ids are read from it when one is asked for.
    """

    def __init__(self, index: h5py.File) -> None:
        self._index, self._checksum = Path(index.filename), checksums.checksum(Path(index.filename))
        table = index["clips"]
        self.domains, self.splits, self.labels, self.recordings = (
            table[name][()].astype(np.int64) for name in ("domain", "split", "label", "recording")
        )
        if table["id"].shape != self.labels.shape:
            raise ValueError("it has other ids than clips")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def ids(self) -> Texts:
        """Every clip's.

        Raises:
            CacheError: the index is no longer the one that was opened.
        """
        try:
            if checksums.checksum(self._index) != self._checksum:
                raise checksums.DamagedError("it has changed meanwhile")
            with open_hdf5(self._index) as file:
                stored = file["clips/id"].asstr()
                runs = (stored[first : first + AT_ONCE] for first in range(0, len(self), AT_ONCE))
                return Texts(identity for run in runs for identity in run)
        except (OSError, RuntimeError, *FOREIGN) as error:
            raise CacheError(f"{self._index} cannot be read: {error}.", "Run the same command again.") from error


class OtherVersionError(CacheError):
    """A cache whose layout this version does not know."""

    def __init__(self, folder: Path, version: str, why: str = "") -> None:
        super().__init__(
            f"{folder} was prepared by another version of mbcd ({version}): {why}.",
            "Run the same `mbcd prepare` again; that folder can then be deleted.",
        )
        self.args = (folder, version, why)

    def __reduce__(self):
        return type(self), self.args


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a shard's group: rows [R, ...], mapped or still in the file, their checksums [R] uint64, and the
    scales [R, C] of int8 rows."""

    rows: np.ndarray | h5py.Dataset
    scales: np.ndarray | None
    sums: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.rows.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Type in which rows are read."""
        return self.rows.dtype if self.scales is None else np.dtype(np.float32)


class ModalityCache:
    """One modality's cache on disk, opened for reading.

    Attributes:
        folder, fingerprint, recipe, provenance: where it is and how it was made.
        modality: the resolved settings it was prepared with.
        views: V, training views stored per training clip.
        passport: of its encoder, as JSON; None where nothing of it is frozen.
        online: where V is 0, the JSON of what decodes training views (`data.online.MediaSource`); else None.
        files: name -> checksum of every other file of the cache. root_checksum: over all that it holds.

    Args:
        verify: compare a row with its checksum when it is read for the first time in this process, always, or never.
    """

    def __init__(self, folder: Path, *, verify: Verify = "first") -> None:
        self.folder = folder
        self._verify = verify
        self.fingerprint = folder.name.rsplit("-", 1)[-1]
        version = "unknown"
        try:
            # First: of a damaged heap of strings HDF5 does not always tell; it can search it for ever.
            checksums.verified(folder / "index.h5")
            with open_hdf5(folder / "index.h5") as file:
                version = str(file.attrs.get("mbcd_version", "unknown"))[:40]
                if file.attrs["format"] != FORMAT:
                    told = str(file.attrs["format"])[:40]
                    raise OtherVersionError(folder, version, f"format {told} instead of {FORMAT}")
                self.recipe = json.loads(file.attrs["recipe"])
                if not isinstance(self.recipe["modality"], str):
                    raise TypeError("its modality has no name")
                self.modality: Modality = _MODALITY.validate_json(file.attrs["modality_settings"])
                self.prepared_at = str(file.attrs["prepared_at"])
                self.listing = str(file.attrs["listing"])
                self.files: dict[str, str] = json.loads(file["files"].asstr()[()])
                self.root_checksum = str(file.attrs["root_checksum"])
                self.provenance = {
                    key: str(value)
                    for key, value in file.attrs.items()
                    if key not in ("recipe", "modality_settings", "format", "listing")
                }
                self.domains = tuple(name.decode() for name in file["domains"][()])
                self.label_names = tuple(name.decode() for name in file["label_names"][()])
                self.clips = ClipTable(file)
                rows = file["rows"]
                self._shard, self._row = rows["shard"][()], rows["row"][()]
                clip, view = rows["clip"][()], rows["view"][()]
                self.rejected = read_rejected(file)
                self.passport = str(file["passport"].asstr()[()]) if "passport" in file else None
                self.online = str(file["online"].asstr()[()]) if "online" in file else None
                self._check_indices(clip, view)
        except (KeyError, ValidationError) as error:
            if not checksums.is_whole(folder / "index.h5"):
                raise self._damaged(folder / "index.h5", error) from error
            lacks = "its settings are not those of this version" if isinstance(error, ValidationError) else str(error)
            raise OtherVersionError(folder, version, lacks.strip("'\"")) from error
        except (OSError, RuntimeError, *FOREIGN) as error:
            raise self._damaged(folder / "index.h5", error) from error
        views = int(view.max(initial=TEST_VIEW)) + 1
        # _where[clip, view + 1] is the row of that view, -1 where it is not stored.
        self._where = np.full((len(self.clips), views + 1), -1, np.int32)
        self._where[clip, view + 1] = np.arange(len(clip), dtype=np.int32)
        self._seen = np.zeros(len(clip), bool)
        self.views = views
        self._maps: dict[tuple[int, str], list[_Part]] = {}

    def _check_indices(self, clip: np.ndarray, view: np.ndarray) -> None:
        """Refuse an index whose numbers lead out of its own tables.

        Raises:
            ValueError: they do.
        """
        count, shards = len(self.clips), len(self.files)
        limits = {
            "label": (self.clips.labels, -1, len(self.label_names)),  # -1: new clips without one
            "domain": (self.clips.domains, 0, len(self.domains)),
            "split": (self.clips.splits, 0, len(SPLITS)),
            "recording": (self.clips.recordings, 0, count),
            "clip": (clip, 0, count),
            "view": (view, TEST_VIEW, 1 << 15),
            "shard": (self._shard, 0, shards),
            "row": (self._row, 0, 1 << 31),
        }
        for name, (values, least, end) in limits.items():
            wanted = count if name in ("label", "domain", "split", "recording") else len(clip)
            if values.shape != (wanted,) or values.dtype.kind not in "iu":
                raise ValueError(f"its {name}s are no list of whole numbers of the right length")
            if len(values) and not least <= values.min() <= values.max() < end:
                raise ValueError(f"a {name} is out of range")

    def corrupted(self, corruption: Corruption) -> ModalityCache:
        """The cache of these clips' test views after a corruption.

        Raises:
            CacheError: damaged, or of other clips or another recipe.
        """
        cache = ModalityCache(self.folder / corruption.folder, verify=self._verify)
        if (cache.listing, cache.recipe) != (self.listing, {**self.recipe, "corruption": corruption.folder}):
            raise CacheError(f"{cache.folder} is not what its name says.", "Delete that folder and prepare it again.")
        return cache

    def stored(self, view: int) -> np.ndarray:
        """[N] bool: clips that have `view`."""
        if view >= self.views:
            return np.zeros(len(self.clips), bool)
        return self._where[:, view + 1] >= 0

    def _damaged(self, path: Path, why: object) -> CacheError:
        what = "is missing" if isinstance(why, FileNotFoundError) else f"is damaged: {why}"
        return CacheError(f"{path} {what}.", f"`mbcd repair {self.folder}` computes it anew from the media.")

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The state dict in the file `name` (tail.pt, trunk.pt).

        Raises:
            CacheError: missing or damaged.
        """
        path = self.folder / name
        try:
            if checksums.verified(path) != self.files.get(name):
                raise checksums.DamagedError("it is another one than the cache was finished with")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged pickles raise whatever their bytes lead to
            raise self._damaged(path, lines_of(error)[0]) from error

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in self.folder.glob("shard-*.h5"))

    def shapes(self, view: int = TEST_VIEW) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Per part the shape of one row and its dtype; test and training views may differ in crop."""
        stored = np.flatnonzero(self.stored(view))
        if not len(stored):
            return []
        shard = int(self._shard[self._where[stored[0], view + 1]])
        return [(part.shape, part.dtype) for part in self._shard_parts(shard, group_of(view))]

    def _shard_parts(self, number: int, group: str) -> list[_Part]:
        """Parts of one shard's group: memory maps where stored contiguously, else open datasets read row by row.

        They stay open: opened anew for every batch of 16, reading takes 5 and 9 times as long for av-digits' sound and
        video, 1.2 times for rows of 4.8 MB (1.1 compressed; AMD EPYC, page cache).
        """
        if (number, group) not in self._maps:
            path = shard_path(self.folder, number)
            try:
                if checksums.checksum(path) != self.files[path.name]:
                    raise checksums.DamagedError("it is another one than the cache was finished with")
                file = open_hdf5(path)
                parts: list[_Part] = []
                for index in range(int(file[group].attrs["parts"])):
                    data = file[f"{group}/part{index}"]
                    key = f"{group}/part{index}_scale"
                    scales = file[key][()] if key in file else None
                    sums = file[f"{group}/part{index}_sum"][()]
                    known = data.dtype.kind in "fiu" and getattr(sums, "dtype", None) == np.uint64
                    if not (known and len(data.shape) and sums.shape == data.shape[:1]):
                        raise checksums.DamagedError("it holds other arrays than rows of numbers and their checksums")
                    if scales is not None and np.shape(scales) != (len(data), *scale_shape(data.shape[1:])):
                        raise checksums.DamagedError("its scales are not those of its rows")
                    offset = data.id.get_offset()
                    if offset is None or data.chunks is not None:
                        parts.append(_Part(data, scales, sums))  # compressed, or empty
                        continue
                    if path.stat().st_size < offset + data.size * data.dtype.itemsize:
                        raise checksums.DamagedError("it is truncated")
                    # A plain view of the map: numpy.memmap makes an object of its own for every row (2 us; 8 times).
                    mapped = np.asarray(np.memmap(path, data.dtype, "r", offset, data.shape))
                    parts.append(_Part(mapped, scales, sums))
                if all(isinstance(part.rows, np.ndarray) for part in parts):
                    file.close()
            except (OSError, RuntimeError, *FOREIGN) as error:
                raise self._damaged(path, error) from error
            self._maps[number, group] = parts
        return self._maps[number, group]

    def read(self, clips: np.ndarray, views: np.ndarray) -> tuple[torch.Tensor, ...]:
        """The parts of `clips` [B] in `views` [B] (-1 = test view), each a new tensor [B, ...]; int8 comes as float32.

        They lie in page-locked memory where this process uses a GPU, which copies them from there by itself.

        Raises:
            CacheError: a view is not stored, or what is stored is damaged.
        """
        rows = self._where[clips, views + 1]
        if (rows < 0).any():
            missing = self.clips.ids[int(clips[rows < 0][0])]
            raise CacheError(
                f"The cache {self.folder} does not hold the view asked for of clip {missing}.",
                "Prepare with --set dataset.target_split=all to test all clips of the target domain.",
            )
        group = group_of(int(views[0]))  # a batch holds training views or test views, never both
        made: list[torch.Tensor] = []
        out: list[np.ndarray] = []
        for position, row in enumerate(rows):
            source = self._shard_parts(int(self._shard[row]), group)
            made = made or [_empty((len(rows), *part.shape), part.dtype) for part in source]
            out = out or [tensor.numpy() for tensor in made]
            at = int(self._row[row])
            if any(at >= len(part.sums) for part in source):
                path = shard_path(self.folder, int(self._shard[row]))
                raise self._damaged(path, f"it has no row {at}")
            if [(part.shape, part.dtype) for part in source] != [(array.shape[1:], array.dtype) for array in out]:
                path = shard_path(self.folder, int(self._shard[row]))
                raise self._damaged(path, "its rows are of another shape or type than those before")
            unknown = self._verify != "off" and not (self._seen[row] and self._verify == "first")
            for part, target in zip(source, out, strict=True):
                stored = part.rows[at]
                if part.scales is None:
                    target[position] = stored
                    held = (target[position],)
                else:
                    restore(stored, part.scales[at], out=target[position])
                    held = (stored, part.scales[at])
                clip, view = int(clips[position]), int(views[position])
                if unknown and checksums.of_row(*held, clip=clip, view=view) != part.sums[at]:
                    path = shard_path(self.folder, int(self._shard[row]))
                    why = f"the stored view of clip {self.clips.ids[clip]} is not what was written"
                    raise self._damaged(path, why)
            self._seen[row] = True
        return tuple(made)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
    of = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=of, pin_memory=torch.cuda.is_initialized())
