"""`mbcd prepare DATASET --check`: what is there, what is missing, how large the cache and how long the preparation.

Reads the tables and folder listings; opens at most a few clips, to time their decoding. Nothing is written.

Letters: N clips.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from mbcd_cli.data.cache import group_of
from mbcd_cli.data.corruptions import SEVERITIES
from mbcd_cli.data.media.checks import MOST_MISSING
from mbcd_cli.data.media.decoding import DecodeJob, decode
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.readers.presence import Gap, Presence, check_media
from mbcd_cli.data.records import SPLITS, Rejected
from mbcd_cli.encoders import described_encoders
from mbcd_cli.errors import CheckpointError
from mbcd_cli.files import free_bytes
from mbcd_cli.preparation.cache_plan import (
    Plan,
    corrupted_plans,
    corruptions_named,
    plan_cache,
    read_listing,
    stored_views,
)
from mbcd_cli.preparation.trunk import meta_inputs, meta_trunk, row_bytes, weights_file
from mbcd_cli.runtime import configure
from mbcd_cli.settings import Settings

_TIMED_CLIPS, _TIMED_SECONDS = 4, 1.0
_LONG_FILE = 200 * 2**20
"""A longer video is not opened: its index alone takes seconds."""


@dataclass(frozen=True, slots=True)
class CheckedWeights:
    """Whether an encoder's weights are there, and are those expected; where not, `message` says why."""

    present: bool
    message: str = ""
    file: str = ""
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class CheckedModality:
    """What is there of one modality, and what `prepare` would make of it.

    Attributes:
        clips, complete, absent, incomplete: that should be there, of which nothing, all or a part is missing.
        files, files_missing: that should be there (every frame, in folders of frames), and those that are not.
        unusable: clips that were tried and cannot be used.
        weights: None where the encoder needs none.
        views: per group of rows ("train", "test"); bytes_per_view and trunk_gflop (1e9 floating-point operations of
            the trunk on one view, without those of a whole model, of which its file alone tells) likewise.
        bytes: of the whole cache, with corrupted views where they are asked for; bytes_to_write, weights_to_write: of
            what is not there yet.
        shards, shards_there: of the cache, and those that are written already.
        decode_seconds_per_clip: of one worker; decode_timed_clips: from how many clips, 0 where it is the usual time.
        seconds: that preparing it takes, about.
    """

    clips: int
    complete: int
    absent: int
    incomplete: int
    files: int
    files_missing: int
    gaps: list[Gap]
    unusable: list[Rejected]
    encoder: str
    cut: str
    weights: CheckedWeights | None
    views: dict[str, int]
    bytes_per_view: dict[str, int]
    bytes: int
    bytes_to_write: int
    weights_to_write: int
    shards: int
    shards_there: int
    trunk_gflop: dict[str, float]
    decode_seconds_per_clip: float
    decode_timed_clips: int
    seconds: float

    @property
    def lacks_weights(self) -> bool:
        """Whether `prepare` would stop for want of its weights."""
        return self.weights is not None and not self.weights.present


@dataclass(frozen=True, slots=True)
class Checked:
    """What `prepare` would find and do.

    Attributes:
        clips: all that are listed; splits: per split; domains: per domain and split.
        layout: how the media lie on the disk, in words.
        views: training views per clip.
        bytes, bytes_to_write, free_bytes: of all caches, of what is still to be written, free on the disk.
        seconds: that preparing takes, about.
        exit_code: that `prepare` would end with: 1 without weights or room on the disk, 3 when more clips lack files
            than `dataset.max_bad`.
    """

    dataset: str
    reader: str
    root: str | None
    clips: int
    splits: dict[str, int]
    domains: dict[str, dict[str, int]]
    classes: int
    layout: list[str]
    warnings: list[str]
    modalities: dict[str, CheckedModality]
    clips_to_be_rejected: int
    views: int
    cache: str
    bytes: int
    bytes_to_write: int
    free_bytes: int
    fits: bool
    device: str
    workers: int
    seconds: float
    exit_code: int


def check(settings: Settings, *, corruptions: Sequence[str] = (), severities: Sequence[int] = SEVERITIES) -> Checked:
    """What `prepare` would find and do.

    Args:
        corruptions, severities: as `preparation.prepare.prepare` takes them.

    Raises:
        ManifestError, SettingsError: as `read_listing`.
    """
    device = configure(settings.runtime)
    settings = described_encoders(settings)
    listing = read_listing(settings)
    wanted = list(product(corruptions_named(corruptions, listing.modalities), severities))
    present = check_media(listing)
    speed = _flops_per_second(device) if any(m.cut != "input" for m in listing.modalities.values()) else None
    modalities = {
        name: _modality(settings, listing, name, modality, present[name], speed, wanted)
        for name, modality in listing.modalities.items()
    }
    lost = {r.clip for r in listing.rejected}
    for name, presence in present.items():
        lost |= {gap.clip for gap in presence.gaps if not _mendable(settings, listing.modalities[name], gap)}
        lost |= {bad.clip for bad in modalities[name].unusable}
    counts = _counts(listing)
    needed = sum(checked.bytes_to_write + checked.weights_to_write for checked in modalities.values())
    free = free_bytes(settings.cache.dir)
    stops = needed > free or any(checked.lacks_weights for checked in modalities.values())
    warnings = [*listing.warnings]
    if settings.dataset.leave_out != "none" and settings.dataset.left_out is None:
        warnings.append("what dataset.leave_out will leave out is not known before `prepare`, and is counted here too")
    exit_code = 0 if settings.dataset.tolerates(len(lost), len(listing.clips) + len(listing.rejected)) else 3
    return Checked(
        dataset=listing.name,
        reader=settings.dataset.reader.name,
        root=str(settings.dataset.root) if settings.dataset.root else None,
        clips=len(listing.clips) + len(listing.rejected),
        splits={split: sum(counts[domain][split] for domain in listing.domains) for split in SPLITS},
        domains=counts,
        classes=len(listing.label_names),
        layout=listing.notes,
        warnings=warnings,
        modalities=modalities,
        clips_to_be_rejected=len(lost),
        views=settings.cache.views,
        cache=str(settings.cache.dir / listing.name),
        bytes=sum(checked.bytes for checked in modalities.values()),
        bytes_to_write=needed,
        free_bytes=free,
        fits=needed <= free,
        device=str(device),
        workers=settings.cache.workers,
        seconds=round(sum(checked.seconds for checked in modalities.values()), 1),
        exit_code=1 if stops else exit_code,
    )


def _counts(listing: Listing) -> dict[str, dict[str, int]]:
    """Clips per domain and split."""
    clips = listing.clips
    pairs = np.bincount(clips.domains * len(SPLITS) + clips.splits, minlength=len(clips.domain_names) * len(SPLITS))
    table = dict(zip(clips.domain_names, pairs.reshape(-1, len(SPLITS)).tolist(), strict=True))
    return {d: dict(zip(SPLITS, table.get(d, [0] * len(SPLITS)), strict=True)) for d in listing.domains}


def _modality(
    settings: Settings,
    listing: Listing,
    name: str,
    modality: Modality,
    presence: Presence,
    speed: float | None,
    corruptions: Collection[tuple[str, int]],
) -> CheckedModality:
    source, weights = None, None
    try:
        if source := weights_file(settings, modality):
            weights = CheckedWeights(True, file=str(source.file), sha256=source.sha256)
    except CheckpointError as error:
        weights = CheckedWeights(False, str(error))
        with suppress(CheckpointError):  # where it is another file than the settings say, it is told which
            source = weights_file(settings, modality.model_copy(update={"weights_sha256": None}))
            weights = replace(weights, file=str(source.file), sha256=source.sha256)
    plan = plan_cache(settings, listing, name, modality, weights=source)
    to_do = plan.to_do(listing.clips)
    left = np.array([i for n in to_do for i in plan.shards[n]], np.int64)
    views = _views(plan, listing.clips.splits)
    views_left = _views(plan, listing.clips.splits[left])
    corrupted = corrupted_plans(plan, settings, listing.clips, modality, corruptions)
    corrupted_left = sum(one.bytes_of(one.to_do(listing.clips)) for one in corrupted)
    views_left["test"] += corrupted_left // row_bytes(plan.shapes["test"])
    decoding, timed, unusable = _decode_seconds(settings, listing, name, modality, presence)
    gflop = {group: _gflop(settings, name, modality, group) for group in ("train", "test")}
    work = sum(gflop[group] * count for group, count in views_left.items()) * 1e9
    decode_s = (
        decoding * (len(left) + corrupted_left // row_bytes(plan.shapes["test"])) / max(settings.cache.workers, 1)
    )
    trunk_s = work / speed if speed and work else 0.0
    return CheckedModality(
        clips=presence.clips,
        complete=presence.complete,
        absent=presence.absent,
        incomplete=presence.clips - presence.complete - presence.absent,
        files=presence.files,
        files_missing=presence.files_missing,
        gaps=presence.gaps,
        unusable=unusable,
        encoder=modality.encoder,
        cut=modality.cut,
        weights=weights,
        views=views,
        bytes_per_view={group: row_bytes(plan.shapes[group]) for group in ("train", "test")},
        bytes=int(sum(one.sizes.sum() for one in (plan, *corrupted))),
        bytes_to_write=plan.bytes_of(to_do) + corrupted_left,
        weights_to_write=plan.weights_to_write,
        shards=len(plan.shards),
        shards_there=len(plan.shards) - len(to_do),
        trunk_gflop={group: round(value, 2) for group, value in gflop.items()},
        decode_seconds_per_clip=round(decoding, 4),
        decode_timed_clips=timed,
        seconds=round(max(decode_s, trunk_s), 1),  # the two overlap
    )


def _views(plan: Plan, splits: np.ndarray) -> dict[str, int]:
    """Views of clips of these splits, [N], per group of rows."""
    counts = {"train": 0, "test": 0}
    for views, clips in zip(plan.views, np.bincount(splits, minlength=len(SPLITS)).tolist(), strict=True):
        for view in views:
            counts[group_of(view)] += clips
    return counts


def _mendable(settings: Settings, modality: Modality, gap: Gap) -> bool:
    """Whether `prepare` will take neighbouring frames instead of what is missing."""
    if settings.dataset.missing_frames != "nearest" or not modality.framed:
        return False
    return gap.share <= MOST_MISSING and gap.expected - gap.missing >= settings.dataset.min_frames


def _gflop(settings: Settings, name: str, modality: Modality, group: str) -> float:
    """Of the trunk on one view, counted on shapes."""
    trunk = meta_trunk(settings, name, modality)
    if not trunk.names:
        return 0.0
    with FlopCounterMode(display=False) as counter:
        trunk(meta_inputs(modality, group))
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def _flops_per_second(device: torch.device) -> float:
    """What this device does on a convolution like those of the trunks."""
    convolution = torch.nn.Conv3d(64, 64, (1, 3, 3), padding=(0, 1, 1), bias=False).to(device)
    batch = 1 if device.type == "cpu" else 16
    x = torch.zeros(batch, 64, 8, 56, 56, device=device)
    flops = 2 * 64 * 64 * 9 * x[:, 0].numel()
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        float(convolution(x).sum())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return flops / min(seconds[1:])


def _decode_seconds(
    settings: Settings, listing: Listing, name: str, modality: Modality, presence: Presence
) -> tuple[float, int, list[Rejected]]:
    """Seconds to decode one clip into its views (of a few that are there), how many were timed (0: as stated), and
    those of them that cannot be used."""
    lacking = {gap.clip for gap in presence.gaps}
    views, clips = stored_views(settings), listing.clips
    column = clips.media[name]
    whole = [i for i, identity in enumerate(clips.ids) if column.has(i) and identity not in lacking]
    job = DecodeJob(name, modality, settings.dataset, settings.cache.seed)
    spent: list[float] = []
    unusable: list[Rejected] = []
    for index in whole[:: max(len(whole) // _TIMED_CLIPS, 1)][:_TIMED_CLIPS]:
        clip = clips[index]
        wanted = views[clips.splits[index]] or [0]
        if clip.media[name].unit != "row" and clip.media[name].path.stat().st_size >= _LONG_FILE:
            continue
        started = time.perf_counter()
        decoded = decode(index, clip, wanted, job)
        if decoded.rejected is not None:
            unusable.append(decoded.rejected)
            continue
        if not spent:
            started = time.perf_counter()  # the first time also paid for imports
            decode(index, clip, wanted, job)
        spent.append(time.perf_counter() - started)
        if sum(spent) > _TIMED_SECONDS:
            break
    seconds = sorted(spent)[len(spent) // 2] if spent else modality.stated_seconds
    return seconds, len(spent), unusable
