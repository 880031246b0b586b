"""Reading the cache: modalities joined by clip, rows mapped from the shards, batches in a reproducible order.

Letters: N clips, B clips in a batch, V stored training views.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from mbcd_cli.data.cache import FORMAT, flatten, group_of, read_rejected, recipe_of
from mbcd_cli.data.records import SPLITS, TEST_VIEW, Batch, Rejected, modality_order
from mbcd_cli.errors import CacheError
from mbcd_cli.settings import Modality, Settings

_MODALITY = TypeAdapter(Modality)


@dataclass(frozen=True, slots=True)
class ClipTable:
    """The clips of a dataset: ids, and as int arrays [N] domain (index), split (0 train, 1 test) and label."""

    ids: list[str]
    domains: np.ndarray
    splits: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class ModalityCache:
    """One modality's cache on disk, opened for reading.

    Attributes:
        folder, fingerprint, recipe, provenance: where it is and how it was made.
        modality: the resolved settings it was prepared with.
        views: V, training views stored per training clip.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fingerprint = folder.name.rsplit("-", 1)[-1]
        try:
            with h5py.File(folder / "index.h5", "r") as file:
                if file.attrs["format"] != FORMAT:
                    raise CacheError(
                        f"Cache {folder} has format {file.attrs['format']}, this mbcd reads {FORMAT}.",
                        "Prepare again.",
                    )
                self.recipe = json.loads(file.attrs["recipe"])
                self.modality: Modality = _MODALITY.validate_json(file.attrs["modality_settings"])
                self.prepared_at = str(file.attrs["prepared_at"])
                self.listing = str(file.attrs["listing"])
                self.provenance = {
                    key: str(value)
                    for key, value in file.attrs.items()
                    if key not in ("recipe", "modality_settings", "format", "listing")
                }
                self.domains = tuple(file["domains"].asstr()[()])
                self.label_names = tuple(file["label_names"].asstr()[()])
                table = file["clips"]
                self.clips = ClipTable(
                    ids=list(table["id"].asstr()[()]),
                    domains=table["domain"][()].astype(np.int64),
                    splits=table["split"][()].astype(np.int64),
                    labels=table["label"][()].astype(np.int64),
                )
                rows = file["rows"]
                self._shard, self._row = rows["shard"][()], rows["row"][()]
                clip, view = rows["clip"][()], rows["view"][()]
                self.rejected = read_rejected(file)
        except (OSError, KeyError, ValueError, ValidationError) as error:
            raise CacheError(
                f"Cache {folder} cannot be read: {error}.", "Delete that folder and run `mbcd prepare` again."
            ) from error
        views = int(view.max(initial=TEST_VIEW)) + 1
        # _where[clip, view + 1] is the row of that view, -1 where it is not stored.
        self._where = np.full((len(self.clips), views + 1), -1, np.int64)
        self._where[clip, view + 1] = np.arange(len(clip))
        self.views = views
        self._maps: dict[tuple[int, str], list[np.ndarray]] = {}

    def stored(self, view: int) -> np.ndarray:
        """[N] bool: clips that have `view`."""
        return self._where[:, view + 1] >= 0

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in self.folder.glob("shard-*.h5"))

    def shapes(self, view: int = TEST_VIEW) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Per part the shape of one row and its dtype; test and training views may differ in crop."""
        stored = np.flatnonzero(self._where[:, view + 1] >= 0)
        if not len(stored):
            return []
        shard = int(self._shard[self._where[stored[0], view + 1]])
        return [(part.shape[1:], part.dtype) for part in self._shard_parts(shard, group_of(view))]

    def _shard_parts(self, number: int, group: str) -> list[np.ndarray]:
        """Parts of one shard's group: memory maps where stored contiguously, else open datasets read row by row."""
        if (number, group) not in self._maps:
            path = self.folder / f"shard-{number:05d}.h5"
            try:
                file = h5py.File(path, "r")
                parts: list[np.ndarray] = []
                for index in range(int(file[group].attrs["parts"])):
                    data = file[f"{group}/part{index}"]
                    offset = data.id.get_offset()
                    if offset is None or data.chunks is not None:
                        parts.append(data)  # compressed, or empty
                        continue
                    if path.stat().st_size < offset + data.size * data.dtype.itemsize:
                        raise CacheError(f"Shard {path} is truncated.", "Delete it and run `mbcd prepare` again.")
                    parts.append(np.memmap(path, data.dtype, "r", offset, data.shape))
                if all(isinstance(part, np.memmap) for part in parts):
                    file.close()
            except (OSError, KeyError) as error:
                raise CacheError(
                    f"Shard {path} cannot be read: {error}.", "Delete it and run `mbcd prepare` again."
                ) from error
            self._maps[number, group] = parts
        return self._maps[number, group]

    def read(self, clips: np.ndarray, views: np.ndarray) -> tuple[torch.Tensor, ...]:
        """The parts of `clips` [B] in `views` [B] (-1 = test view), each a new tensor [B, ...].

        Raises:
            CacheError: a view is not stored.
        """
        rows = self._where[clips, views + 1]
        if (rows < 0).any():
            missing = self.clips.ids[int(clips[rows < 0][0])]
            raise CacheError(
                f"The cache {self.folder} does not hold the view asked for of clip {missing}.",
                "Prepare with --set dataset.target_split=all to test all clips of the target domain.",
            )
        group = group_of(int(views[0]))  # a batch holds training views or test views, never both
        out: list[np.ndarray] = []
        for position, row in enumerate(rows):
            source = self._shard_parts(int(self._shard[row]), group)
            out = out or [np.empty((len(rows), *part.shape[1:]), part.dtype) for part in source]
            for part, target in zip(source, out, strict=True):
                target[position] = part[int(self._row[row])]
        return tuple(torch.from_numpy(array) for array in out)


class CachedDataset:
    """Prepared modalities joined by clip: the only thing train, evaluate and landscape see of a dataset.

    Attributes:
        name, domains, label_names, classes: of the dataset.
        modalities: resolved settings, in fusion order.
        fingerprints: per modality.
        clips: the clip table; rejected clips stay in it but are never selected.
        rejected: what `prepare` could not use.
    """

    def __init__(self, name: str, caches: dict[str, ModalityCache], modalities: dict[str, Modality]) -> None:
        self.name = name
        self.caches = caches
        self.modalities = modalities
        first = next(iter(caches.values()))
        for other in caches.values():
            if other.listing != first.listing:
                raise CacheError(
                    f"{first.folder.name} and {other.folder.name} were prepared from different clip lists.",
                    "Run `mbcd prepare` once more for all modalities together.",
                )
        self.domains, self.label_names, self.clips = first.domains, first.label_names, first.clips
        self.classes = len(self.label_names)
        self.fingerprints = {key: cache.fingerprint for key, cache in caches.items()}
        self.rejected: list[Rejected] = [r for cache in caches.values() for r in cache.rejected]
        gone = {r.clip for r in self.rejected}
        self._usable = np.array([id_ not in gone for id_ in self.clips.ids])

    @property
    def tail_weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Initial weights of the tails that `prepare` stored (pretrained encoders); empty for whole encoders."""
        weights = {}
        for name, cache in self.caches.items():
            path = cache.folder / "tail.pt"
            if cache.recipe.get("weights") is not None:
                try:
                    weights[name] = torch.load(path, map_location="cpu", weights_only=True)
                except (OSError, RuntimeError, ValueError, EOFError) as error:
                    raise CacheError(
                        f"{path} cannot be read: {error}.",
                        "Delete that cache folder and run `mbcd prepare` again.",
                    ) from error
        return weights

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in self.caches.values())

    def select(self, *, domains: Sequence[str], splits: Sequence[str] = SPLITS, limit: int | None = None) -> np.ndarray:
        """Indices (int64, table order) of the usable clips of these domains and splits.

        Args:
            limit: at most this many, spread evenly over the table.

        Raises:
            CacheError: a domain is unknown, or nothing is left.
        """
        unknown = [domain for domain in domains if domain not in self.domains]
        if unknown:
            raise CacheError(
                f"Dataset {self.name} has no domain {unknown[0]!r}.",
                f"Its domains are {', '.join(self.domains)}.",
            )
        domain_ids = [self.domains.index(domain) for domain in domains]
        split_ids = [SPLITS.index(split) for split in splits]
        chosen = np.flatnonzero(
            self._usable & np.isin(self.clips.domains, domain_ids) & np.isin(self.clips.splits, split_ids)
        )
        if not len(chosen):
            raise CacheError(
                f"Dataset {self.name} has no usable clips of domains {', '.join(domains)}, split {'/'.join(splits)}.",
                "`mbcd prepare` lists the rejected clips and why.",
            )
        if limit is not None and limit < len(chosen):
            chosen = chosen[np.linspace(0, len(chosen) - 1, limit).round().astype(np.int64)]
        return chosen.astype(np.int64)

    def batches(
        self,
        clips: np.ndarray,
        *,
        batch_size: int,
        training: bool,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
        read: Callable[[str, np.ndarray, np.ndarray], tuple[torch.Tensor, ...]] | None = None,
    ) -> Iterator[Batch]:
        """Batches over `clips`.

        Args:
            training: shuffle by (seed, epoch) and draw one stored training view per clip and modality; else table
                order and the test view.
            drop_last: leave out a short last batch.
            start: skip this many batches (to resume inside an epoch).
            share: (rank, world): of every batch the rank-th of `world` equal runs of rows.
            read: (modality, clips [B], views [B]) -> parts, instead of reading the caches.
        """
        if read is None:

            def read(name: str, index: np.ndarray, chosen: np.ndarray) -> tuple[torch.Tensor, ...]:
                return self.caches[name].read(index, chosen)

        rank, world = share
        order = np.asarray(clips, np.int64)
        views = {name: np.full(len(order), TEST_VIEW, np.int64) for name in self.modalities}
        if training:
            generator = np.random.default_rng([seed, epoch])
            order = order[generator.permutation(len(order))]
            # Views are drawn per modality: V views of M modalities give V^M combinations.
            views = {name: generator.integers(self.caches[name].views, size=len(order)) for name in self.modalities}
        stop = len(order) - len(order) % batch_size if drop_last else len(order)
        for first in range(start * batch_size, stop, batch_size):
            size = min(batch_size, stop - first) // world
            chosen = slice(first + rank * size, first + (rank + 1) * size)
            index = order[chosen]
            yield Batch(
                inputs={name: read(name, index, views[name][chosen]) for name in self.modalities},
                labels=torch.from_numpy(self.clips.labels[index]),
                domains=torch.from_numpy(self.clips.domains[index]),
                clips=torch.from_numpy(index.copy()),
            )


def prepared_datasets(cache: Path) -> list[str]:
    """Names of the datasets that have a complete cache under `cache`."""
    return sorted({path.parent.parent.name for path in cache.glob("*/*/index.h5")})


def open_dataset(settings: Settings, *, name: str, modalities: Sequence[str] = ()) -> CachedDataset:
    """The prepared dataset `name` that matches `settings`.

    With `settings.modalities` empty whatever was prepared last is taken, with the settings it was prepared with.

    Args:
        settings: the whole tree.
        name: dataset name under the cache folder.
        modalities: the ones wanted, in fusion order; empty takes all.

    Raises:
        CacheError: nothing prepared, a modality missing, or only stale caches; says what differs and what to run.
    """
    folder = settings.cache.dir / name
    known = prepared_datasets(settings.cache.dir)
    if name not in known:
        have = f"Prepared so far: {', '.join(known)}." if known else "Nothing is prepared there yet."
        raise CacheError(
            f"There is no cache of dataset {name!r} in {settings.cache.dir}.",
            f"{have} Run `mbcd prepare` first, or name the folder with --cache-dir.",
        )
    found: dict[str, list[ModalityCache]] = {}
    for index in sorted(folder.glob("*/index.h5")):
        cache = ModalityCache(index.parent)
        found.setdefault(cache.recipe["modality"], []).append(cache)
    for caches in found.values():
        caches.sort(key=lambda cache: cache.prepared_at, reverse=True)
    names = list(modalities) or modality_order(list(settings.modalities) or list(found))
    missing = [n for n in names if n not in found]
    if missing:
        raise CacheError(
            f"Modality {missing[0]!r} of dataset {name} is not prepared.",
            f"Prepared are {', '.join(sorted(found))}; run `mbcd prepare` for it, or choose with --modalities.",
        )
    chosen: dict[str, ModalityCache] = {}
    resolved: dict[str, Modality] = {}
    for modality in names:
        wanted = settings.modalities.get(modality)
        if wanted is None:
            chosen[modality] = found[modality][0]
            resolved[modality] = chosen[modality].modality
            continue
        chosen[modality] = _matching(settings, modality, wanted, found[modality])
        resolved[modality] = _resolved(wanted, chosen[modality].modality)
    return CachedDataset(name, chosen, resolved)


def _resolved(wanted: Modality, prepared: Modality) -> Modality:
    """`wanted`, with what only `prepare` could know (sizes read from the files) filled in."""
    gaps = {
        field: getattr(prepared, field)
        for field in type(wanted).model_fields
        if getattr(wanted, field) is None and getattr(prepared, field) is not None
    }
    return wanted.model_copy(update=gaps)


def _differences(settings: Settings, name: str, wanted: Modality, cache: ModalityCache) -> list[str]:
    """What makes `cache` unfit for `settings`, in words."""
    expected = flatten(recipe_of(settings, name, _resolved(wanted, cache.modality), weights_sha256=None))
    have = flatten(cache.recipe)
    if have.get("test_view") == "all":  # holds more than a test of the test split needs
        expected["test_view"] = "all"
    if "weights" in expected and (wanted.weights is not None) == (have.get("weights") != "random"):
        expected["weights"] = have.get("weights")
    return [
        f"{key.removeprefix('view.')}: cache has {have.get(key)}, settings say {expected.get(key)}"
        for key in dict.fromkeys([*have, *expected])
        if have.get(key) != expected.get(key)
    ]


def _matching(settings: Settings, name: str, wanted: Modality, caches: Sequence[ModalityCache]) -> ModalityCache:
    differences = [_differences(settings, name, wanted, cache) for cache in caches]
    for cache, difference in zip(caches, differences, strict=True):
        if not difference:
            return cache
    closest = min(range(len(caches)), key=lambda index: len(differences[index]))
    raise CacheError(
        f"The cache of {name} is stale ({caches[closest].folder}):\n"
        + "\n".join(f"  {line}" for line in differences[closest]),
        "Run `mbcd prepare` with these settings, or change them back.",
    )
