"""What a modality's cache will be, told before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from mbcd_cli.data.modalities import default_modality
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing, read_dataset
from mbcd_cli.data.records import Clip
from mbcd_cli.errors import ManifestError
from mbcd_cli.naming import modality_faults, name_faults
from mbcd_cli.preparation.trunk import (
    Shapes,
    cached_shapes,
    row_bytes,
)
from mbcd_cli.settings import Settings


def read_listing(settings: Settings) -> Listing:
    """The clips of `settings.dataset`, modalities resolved as far as files tell.

    Raises:
        SettingsError: no such reader.
        ManifestError: the dataset's tables are wrong, or a modality asked for by name is not there.
    """
    wanted = dict(settings.modalities)
    if settings.model.modalities:
        wanted = {name: wanted.get(name) or default_modality(name) for name in settings.model.modalities}
    listing = read_dataset(settings.dataset, wanted)
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

    Attributes:
        sizes: bytes of every clip's rows.
        shapes: shape and dtype of every part of a row, per group.
    """

    folder: Path
    fingerprint: str
    recipe: dict[str, Any]
    views: list[list[int]]
    shards: list[range]
    sizes: list[int]
    shapes: dict[str, Shapes]

    def to_do(self, clips: Sequence[Clip]) -> list[int]:
        """Shards that are still to be written."""
        name = self.recipe["modality"]
        return [n for n, span in enumerate(self.shards) if not is_done(self.folder, n, span, clips, name)]


def plan_cache(
    settings: Settings, listing: Listing, name: str, modality: Modality, *, weights_sha256: str | None
) -> Plan:
    """The plan of one modality; no media file is opened and nothing is computed."""
    recipe = recipe_of(settings, name, modality, weights_sha256=weights_sha256)
    digest = fingerprint(recipe, listing.clips, name=name, root=settings.dataset.root or Path())
    shapes = {group: cached_shapes(name, modality, settings, group) for group in GROUPS}
    sizes = {group: row_bytes(shapes[group]) for group in GROUPS}
    views = stored_views(settings, listing.clips)
    clip_sizes = [sum(sizes[group_of(view)] for view in wanted) for wanted in views]
    return Plan(
        folder=settings.cache.dir / listing.name / f"{name}-{digest}",
        fingerprint=digest,
        recipe=recipe,
        views=views,
        shards=shard_ranges(clip_sizes, limit=settings.cache.shard_clips),
        sizes=clip_sizes,
        shapes=shapes,
    )


def stored_views(settings: Settings, clips: Sequence[Clip]) -> list[list[int]]:
    """Views stored of every clip."""
    return [views_of(clip, views=settings.cache.views, test_view=settings.dataset.target_split) for clip in clips]
