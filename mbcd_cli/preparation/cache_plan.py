"""What a modality's cache will be, told before anything is decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.nn import ModuleDict

from mbcd_cli.data.cache import (
    GROUPS,
    fingerprint,
    group_of,
    is_done,
    recipe_of,
    shard_ranges,
    views_of,
)
from mbcd_cli.data.clips import Clips
from mbcd_cli.data.corruptions import Corruption
from mbcd_cli.data.corruptions.waveform import BABBLE, POOL
from mbcd_cli.data.modalities import asked_modalities
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing, read_dataset
from mbcd_cli.data.records import SPLITS
from mbcd_cli.errors import ManifestError, SettingsError
from mbcd_cli.naming import did_you_mean, modality_faults, name_faults
from mbcd_cli.preparation.trunk import Shapes, WeightsFile, cached_shapes, row_bytes, weights_bytes
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings


def read_listing(settings: Settings) -> Listing:
    """The clips of `settings.dataset`, modalities resolved as far as files tell.

    Raises:
        SettingsError: no such reader.
        ManifestError: the dataset's tables are wrong, or a modality asked for by name is not there.
    """
    listing = read_dataset(settings.dataset, asked_modalities(settings))
    if settings.dataset.leave_out == "audit" and settings.dataset.left_out:
        listing.leave_out(settings.dataset.left_out)
    if absent := [name for name in settings.model.modalities if name not in listing.modalities]:
        reasons = [line for line in listing.warnings if line.startswith(tuple(f"{name}:" for name in absent))]
        raise ManifestError(
            "\n".join([f"{', '.join(absent)}: asked for, and not in the dataset.", *(f"  {line}" for line in reasons)]),
            "Complete the dataset, or leave it out of --modalities.",
        )
    faults = name_faults("dataset name", listing.name)
    for name in listing.modalities:
        faults += modality_faults(name)
        if hasattr(_MODULES, name):  # torch keeps a model's parts as attributes
            faults.append(f"modality name {name!r} is used by torch: choose another")
    if faults:
        raise ManifestError("\n".join(faults), "Rename it in the dataset's table, or the dataset with --name.")
    listing.survey()
    return listing


_MODULES = ModuleDict()


@dataclass(frozen=True, slots=True)
class Plan:
    """What one modality's cache will be: where, of which recipe, which views of which clips in which shards.

    Letters: N clips.

    Attributes:
        views: of a clip of the train split, and of the test split.
        sizes: bytes of every clip's rows, [N] int64.
        weights_bytes: of the weights that are stored beside them.
        shapes: shape and dtype of every part of a row, per group.
        corruption: what is done to the media first; None where the cache is clean.
    """

    folder: Path
    fingerprint: str
    recipe: dict[str, object]
    views: list[list[int]]
    shards: list[range]
    sizes: np.ndarray
    shapes: dict[str, Shapes]
    weights_bytes: int
    corruption: Corruption | None = None

    def to_do(self, clips: Clips) -> list[int]:
        """Shards that are still to be written."""
        name = self.recipe["modality"]
        return [n for n, span in enumerate(self.shards) if not is_done(self.folder, n, span, clips, name)]

    def bytes_of(self, shards: Iterable[int]) -> int:
        """Bytes of the rows of some shards."""
        return sum(int(self.sizes[span.start : span.stop].sum()) for span in (self.shards[n] for n in shards))

    @property
    def weights_to_write(self) -> int:
        """Bytes of the weights that are still to be stored."""
        return 0 if (self.folder / "tail.pt").is_file() else self.weights_bytes


def plan_cache(
    settings: Settings,
    listing: Listing,
    name: str,
    modality: Modality,
    *,
    weights: WeightsFile | None,
    made: Plan | None = None,
    say: Say = SILENT,
) -> Plan:
    """The plan of one modality; no media file is opened and nothing is computed.

    Args:
        weights: of its encoder; None for random ones.
        made: a plan of this modality; it is the one if it has the same recipe.
        say: told how many clips' files have been looked at.
    """
    recipe = recipe_of(settings, name, modality, weights_sha256=weights and weights.sha256)
    if made is not None and made.recipe == recipe:
        return made
    root = settings.dataset.root or Path()
    with say.progress(f"{name}: looking at files", len(listing.clips)) as ticker:
        digest = fingerprint(recipe, listing.clips, name=name, root=root, seen=ticker.advance)
    shapes = {group: cached_shapes(name, modality, settings, group) for group in GROUPS}
    sizes = {group: row_bytes(shapes[group]) for group in GROUPS}
    views = stored_views(settings)
    clip_sizes = np.array([sum(sizes[group_of(view)] for view in wanted) for wanted in views], np.int64)
    clip_sizes = clip_sizes[listing.clips.splits]
    return Plan(
        folder=settings.cache.dir / listing.name / f"{name}-{digest}",
        fingerprint=digest,
        recipe=recipe,
        views=views,
        shards=shard_ranges(clip_sizes.tolist(), limit=settings.cache.shard_clips),
        sizes=clip_sizes,
        shapes=shapes,
        weights_bytes=weights_bytes(settings, name, modality),
    )


def corrupted_plans(
    plan: Plan, settings: Settings, clips: Clips, modality: Modality, wanted: Iterable[tuple[str, int]]
) -> list[Plan]:
    """The plans of a modality's corrupted test views, each in a folder of the clean cache, whose fingerprint it shares.

    Args:
        wanted: kind and severity of every corruption; those of other modalities are left out.
    """
    own = [(kind, severity) for kind, severity in wanted if kind in modality.corruptions]
    if not own:
        return []
    views = [views_of(split, views=0, test_view=settings.dataset.target_split) for split in SPLITS]
    sizes = np.array([len(stored) * row_bytes(plan.shapes["test"]) for stored in views], np.int64)[clips.splits]
    shards = shard_ranges(sizes.tolist(), limit=settings.cache.shard_clips)
    column = clips.media[str(plan.recipe["modality"])]
    pool = tuple(column[i] for i in np.unique(np.linspace(0, len(clips) - 1, POOL).astype(int)) if column.has(i))
    plans = []
    for kind, severity in own:
        corruption = Corruption(kind, severity, pool if kind == BABBLE else ())
        recipe, folder = {**plan.recipe, "corruption": corruption.folder}, plan.folder / corruption.folder
        changed = {"folder": folder, "recipe": recipe, "corruption": corruption, "weights_bytes": 0}
        plans.append(replace(plan, **changed, views=views, sizes=sizes, shards=shards))
    return plans


def corruptions_named(names: Sequence[str], modalities: Mapping[str, Modality]) -> list[str]:
    """The corruptions asked for by name, or with `all`.

    Raises:
        SettingsError: no modality has one.
    """
    there = list(dict.fromkeys(name for modality in modalities.values() for name in modality.corruptions))
    if unknown := [name for name in names if name not in (*there, "all")]:
        raise SettingsError(
            f"There is no corruption {unknown[0]!r} of {', '.join(modalities)}.",
            f"{did_you_mean(unknown[0], there)}There are {', '.join(there) or 'none'}.",
        )
    return there if "all" in names else list(names)


def stored_views(settings: Settings) -> list[list[int]]:
    """Views stored of a clip, by its split."""
    return [views_of(split, views=settings.cache.views, test_view=settings.dataset.target_split) for split in SPLITS]
