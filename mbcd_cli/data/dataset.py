"""Prepared modalities joined by clip, and batches of them in a reproducible order.

Letters: N clips, B clips in a batch, V stored training views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch

from mbcd_cli.data.cache import recipe_of
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.modality_cache import ModalityCache, OtherVersionError
from mbcd_cli.data.online import OnlineViews
from mbcd_cli.data.prepared import check_dataset, prepared_datasets
from mbcd_cli.data.protocol import Read
from mbcd_cli.data.records import SPLITS, TEST_VIEW, Batch, Rejected, modality_order
from mbcd_cli.errors import CacheError
from mbcd_cli.files import flatten
from mbcd_cli.naming import did_you_mean
from mbcd_cli.settings import CacheSettings, Settings, fields_for

PREPARED = fields_for(CacheSettings, "cache")
"""Settings of a cache that are read from it where only its dataset is named."""


class CachedDataset:
    """Prepared modalities joined by clip: the only thing train, evaluate and landscape see of a dataset.

    Attributes:
        name, domains, label_names, classes: of the dataset.
        modalities: resolved settings, in fusion order.
        fingerprints: per modality.
        clips: the clip table; rejected clips stay in it but are never selected.
        rejected: what `prepare` could not use.
        online: decodes the training views that are not stored; None where all are.

    Args:
        root: the dataset's folder, for those views; by default where it was when they were prepared.
        workers: processes that decode them.
    """

    def __init__(
        self,
        name: str,
        caches: dict[str, ModalityCache],
        modalities: dict[str, Modality],
        *,
        root: Path | None = None,
        workers: int = 0,
    ) -> None:
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
            other.clips = first.clips
        self.domains, self.label_names, self.clips = first.domains, first.label_names, first.clips
        self.classes = len(self.label_names)
        self.fingerprints = {key: cache.fingerprint for key, cache in caches.items()}
        self.rejected: list[Rejected] = [r for cache in caches.values() for r in cache.rejected]
        gone = {r.clip for r in self.rejected}
        self._usable = np.ones(len(self.clips), bool)
        if gone:  # ids are read where one is named
            self._usable[:] = [id_ not in gone for id_ in self.clips.ids]
        described = {key: cache.online for key, cache in caches.items() if cache.online is not None}
        self.online = (
            OnlineViews(described, modalities, ids=self.clips.ids, root=root, workers=workers) if described else None
        )

    @property
    def tail_weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Initial state dicts of the tails that `prepare` stored (pretrained encoders); empty for whole encoders."""
        return self._weights("tail.pt")

    @property
    def trunk_weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """State dicts of the trunks that `prepare` stored (where no training view is stored)."""
        return self._weights("trunk.pt")

    @property
    def pretrained(self) -> frozenset[str]:
        """Modalities whose encoder was prepared with a file of weights."""
        weights = {name: cache.recipe.get("weights") for name, cache in self.caches.items()}
        return frozenset(name for name, sha256 in weights.items() if sha256 not in (None, "random"))

    def _weights(self, file: str) -> dict[str, dict[str, torch.Tensor]]:
        caches = {name: cache for name, cache in self.caches.items() if cache.recipe.get("weights") is not None}
        return {name: cache.weights(file) for name, cache in caches.items()}

    def has_test_views(self, clips: np.ndarray) -> bool:
        """Whether the test view of all these clips ([n] indices) is stored, in every modality."""
        return all(cache.stored(TEST_VIEW)[clips].all() for cache in self.caches.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in self.caches.values())

    def select(self, *, domains: Sequence[str], splits: Sequence[str] = SPLITS, limit: int | None = None) -> np.ndarray:
        """Indices ([n] int64, table order) of the usable clips of these domains and splits.

        Args:
            limit: at most this many, spread evenly over the table.

        Raises:
            CacheError: a domain is unknown, or nothing is left.
        """
        unknown = [domain for domain in domains if domain not in self.domains]
        if unknown:
            raise CacheError(
                f"Dataset {self.name} has no domain {unknown[0]!r}.",
                f"{did_you_mean(unknown[0], self.domains)}Its domains are {', '.join(self.domains)}.",
            )
        domain_ids = [self.domains.index(domain) for domain in domains]
        split_ids = [SPLITS.index(split) for split in splits]
        wanted = np.isin(self.clips.domains, domain_ids) & np.isin(self.clips.splits, split_ids)
        chosen = np.flatnonzero(self._usable & wanted)
        if not len(chosen):
            raise CacheError(
                f"Dataset {self.name} has no usable clips of domains {', '.join(domains)}, split {'/'.join(splits)}.",
                "`mbcd prepare` lists the rejected clips and why."
                if wanted.any()
                else "Its table has none: choose other domains with --source-domains.",
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
        views: int = 1,
        read: Read | None = None,
    ) -> Iterator[Batch]:
        """Batches of B clips over `clips`, [n] indices into the clip table.

        Args:
            training: shuffle by (seed, epoch) and draw one stored training view per clip and modality, or decode a
                fresh one where none are stored; else table order and the test view.
            drop_last: leave out a short last batch.
            start: skip this many batches (to resume inside an epoch).
            views: training views of every clip, 1 or 2: rows 2i and 2i + 1 of a batch are two of one clip, which
                differ in every modality that has two stored ones. Order and first views are those of 1.
            share: (rank, world): of every batch the rank-th of `world` equal runs of rows.
            read: (modality, clips [B], views [B]) -> parts, instead of reading the caches.
        """
        if read is None:

            def read(name: str, index: np.ndarray, chosen: np.ndarray) -> tuple[torch.Tensor, ...]:
                return self.caches[name].read(index, chosen)

        rank, world = share
        order = np.asarray(clips, np.int64)
        decoded = self.online.names if training and self.online is not None else ()
        stored = [name for name in self.modalities if name not in decoded]
        chosen = {name: np.full((len(order), 1), TEST_VIEW, np.int64) for name in stored}
        if training:
            generator = np.random.default_rng([seed, epoch])
            order = order[generator.permutation(len(order))]
            # Views are drawn per modality: V views of M modalities give V^M combinations.
            chosen = {name: generator.integers(self.caches[name].views, size=(len(order), 1)) for name in stored}
            if views == 2:
                for name, first in chosen.items():
                    stride = generator.integers(max(self.caches[name].views - 1, 1), size=first.shape)
                    chosen[name] = np.hstack([first, (first + 1 + stride) % self.caches[name].views])
            for name in stored:
                # Sound cut by the frames that a view samples belongs to that view of those frames.
                guide = self.modalities[name].guide
                if guide in chosen and self.caches[guide].views == self.caches[name].views:
                    chosen[name] = chosen[guide]
        stop = len(order) - len(order) % batch_size if drop_last else len(order)
        spans = []
        for first in range(start * batch_size, stop, batch_size):
            size = min(batch_size, stop - first) // world
            spans.append(slice(first + rank * size, first + (rank + 1) * size))
        fresh = None
        if decoded:
            fresh = self.online.batches([order[span] for span in spans], seed=seed, epoch=epoch, views=views)
        with closing(fresh) if fresh is not None else nullcontext():
            for span in spans:
                index = np.repeat(order[span], views)
                parts = {} if fresh is None else next(fresh)
                parts |= {name: read(name, index, chosen[name][span].ravel()) for name in stored}
                yield Batch(
                    inputs={name: parts[name] for name in self.modalities},
                    labels=torch.from_numpy(self.clips.labels[index]),
                    domains=torch.from_numpy(self.clips.domains[index]),
                    clips=torch.from_numpy(index.copy()),
                )


def open_dataset(settings: Settings, *, name: str, modalities: Sequence[str] = ()) -> CachedDataset:
    """The prepared dataset `name` that matches `settings`.

    With `settings.modalities` empty whatever was prepared last is taken, with the settings it was prepared with, as
    long as it is what `settings.cache` asks for.

    Args:
        settings: the whole tree.
        name: dataset name under the cache folder.
        modalities: the ones wanted, in fusion order; empty takes all.

    Raises:
        CacheError: nothing prepared, a modality missing, or only stale caches; says what differs and what to run.
    """
    folder = settings.cache.dir / name
    check_dataset(settings.cache.dir, name)
    caches_of: dict[str, list[ModalityCache]] = {}
    foreign: dict[str, OtherVersionError] = {}
    for index in sorted(folder.glob("*/index.h5")):
        try:
            cache = ModalityCache(index.parent, verify=settings.runtime.verify)
        except OtherVersionError as error:  # in nobody's way as long as there is a newer one
            foreign[index.parent.name.rsplit("-", 1)[0]] = error
            continue
        caches_of.setdefault(cache.recipe["modality"], []).append(cache)
    if lost := _without_index(folder, modalities, caches_of):
        raise CacheError(
            f"The cache {lost} has no index: its preparation was interrupted, or the file is lost.",
            "Run the same `mbcd prepare` again, or choose others with --modalities.",
        )
    for caches in caches_of.values():
        caches.sort(key=lambda cache: cache.prepared_at, reverse=True)
    names = list(modalities) or modality_order(list(settings.modalities) or list(caches_of))
    names = names or list(foreign)
    missing = [n for n in names if n not in caches_of]
    if missing and missing[0] in foreign:
        raise foreign[missing[0]]
    if missing:
        raise CacheError(
            f"Modality {missing[0]!r} of dataset {name} is not prepared.",
            f"{did_you_mean(missing[0], caches_of)}Prepared are {', '.join(sorted(caches_of))}; run `mbcd prepare` for "
            "it, or choose with --modalities.",
        )
    chosen: dict[str, ModalityCache] = {}
    resolved: dict[str, Modality] = {}
    for modality in names:
        wanted = settings.modalities.get(modality)
        if wanted is None:
            chosen[modality] = _newest(settings, modality, caches_of[modality])
            resolved[modality] = chosen[modality].modality
            continue
        chosen[modality] = _matching(settings, modality, wanted, caches_of[modality])
        resolved[modality] = _resolved(wanted, chosen[modality].modality)
    return CachedDataset(name, chosen, resolved, root=settings.dataset.root, workers=settings.cache.workers)


def prepared_summaries(cache: Path) -> Iterator[tuple[str, list[str], tuple[str, ...]]]:
    """(name, modalities, domains) of every dataset that is prepared under `cache`.

    Raises:
        CacheError: one of its caches cannot be read.
    """
    for name in prepared_datasets(cache):
        caches = [ModalityCache(path.parent) for path in sorted((cache / name).glob("*/index.h5"))]
        yield name, list(dict.fromkeys(one.recipe["modality"] for one in caches)), caches[0].domains


def _without_index(folder: Path, wanted: Sequence[str], found: Mapping[str, object]) -> Path | None:
    """A cache with shards and no index, of a modality that is asked for (by name, or as one of all) and not found."""
    shards = {path.parent for path in folder.glob("*/shard-*.h5") if not (path.parent / "index.h5").exists()}
    names = {path: path.name.rpartition("-")[0] for path in sorted(shards)}
    return next((p for p, name in names.items() if name not in found and (not wanted or name in wanted)), None)


def _newest(settings: Settings, name: str, caches: Sequence[ModalityCache]) -> ModalityCache:
    """The newest cache that is as the settings of the cache ask for, where they differ from their defaults.

    Raises:
        CacheError: there is none.
    """
    defaults = CacheSettings()
    # A saved tree names its defaults too: only what differs from them was certainly asked for.
    given = {f: value for f in PREPARED if (value := getattr(settings.cache, f)) != getattr(defaults, f)}
    for cache in caches:
        have = as_prepared(cache)
        if all(getattr(have, field) == value for field, value in given.items()):
            return cache
    have = as_prepared(caches[0])
    lines = [f"  {f}: cache has {was}, settings say {v}" for f, v in given.items() if (was := getattr(have, f)) != v]
    raise CacheError(
        f"The cache of {name} is stale ({caches[0].folder}):\n" + "\n".join(lines),
        "Run `mbcd prepare` with these settings, or leave them out.",
    )


def as_prepared(cache: ModalityCache) -> CacheSettings:
    """The defaults, with `PREPARED` as the cache was prepared."""
    return CacheSettings().model_copy(update={f: cache.recipe[f] for f in PREPARED if f in cache.recipe})


def _resolved(wanted: Modality, prepared: Modality) -> Modality:
    """`wanted`, with what only `prepare` could know (sizes read from the files, what an encoder wants) filled in."""
    defaults = type(wanted)() if prepared.encoder_config is not None else None
    # A saved tree names its defaults too: only what differs from them was certainly asked for.
    unsaid = {f for f in wanted.encoder_settings if defaults and getattr(wanted, f) == getattr(defaults, f)}
    gaps = {
        field: getattr(prepared, field)
        for field in type(wanted).model_fields
        if (getattr(wanted, field) is None or field in unsaid) and getattr(prepared, field) is not None
    }
    return wanted.model_copy(update=gaps)


def _differences(settings: Settings, name: str, wanted: Modality, cache: ModalityCache) -> list[str]:
    """What makes `cache` unfit for `settings`, in words."""
    if cache.modality.kind != wanted.kind:
        return [f"kind: cache has {cache.modality.kind}, settings say {wanted.kind}"]
    expected = flatten(recipe_of(settings, name, _resolved(wanted, cache.modality), weights_sha256=None))
    # A setting that came later has the meaning of its default in caches that do not know it.
    fields = {f"view.{key}": field.default for key, field in type(wanted).model_fields.items()}
    later = {key: value for key, value in {**fields, "trunk_batch_norm": "running"}.items() if key in expected}
    have = {**later, **flatten(cache.recipe)}
    if have.get("target_split") == "all":  # holds more than a test of the test split needs
        expected["target_split"] = "all"
    if "weights" in expected and not settings.cache.random_weights:  # which file it is, `prepare` was told
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
    same_kind = [index for index, cache in enumerate(caches) if cache.modality.kind == wanted.kind]
    closest = min(same_kind or range(len(caches)), key=lambda index: len(differences[index]))
    only = f" (--modalities {','.join(settings.model.modalities)})" if settings.model.modalities else ""
    raise CacheError(
        f"The cache of {name} is stale ({caches[closest].folder}):\n"
        + "\n".join(f"  {line}" for line in differences[closest]),
        f"Run `mbcd prepare` with these settings{only}, or change them back. What `prepare` was given with --config, "
        "--preset or --set modalities... is to be given here too.",
    )
