"""`mbcd prepare DATASET --check`: what is there, what is missing, how large the cache and how long the preparation.

Reads the tables and folder listings; opens at most a few clips, to time their decoding. Nothing is written.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from mbcd_cli.data.cache import group_of
from mbcd_cli.data.media.decoding import DecodeJob, decode
from mbcd_cli.data.media.folders import MOST_MISSING
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.readers.presence import Gap, Presence, check_media
from mbcd_cli.data.records import SPLITS, Rejected
from mbcd_cli.encoders.pretrained import another_file, find_weights, sha256_of
from mbcd_cli.errors import CheckpointError
from mbcd_cli.files import free_bytes
from mbcd_cli.preparation.cache_plan import Plan, plan_cache, read_listing, stored_views
from mbcd_cli.preparation.trunk import meta_inputs, meta_trunk, needs_weights, row_bytes, weights_bytes
from mbcd_cli.runtime import pick_device
from mbcd_cli.settings import Settings

_TIMED_CLIPS, _TIMED_SECONDS = 4, 1.0
_LONG_FILE = 200 * 2**20
"""A longer video is not opened: its index alone takes seconds."""


def check(settings: Settings) -> dict[str, Any]:
    """What `prepare` would find and do.

    Returns:
        A JSON-able report; `exit_code` is the one `prepare` would end with: 1 without weights or room on the disk, 3
        when more clips lack files than `dataset.max_bad`.
    """
    listing = read_listing(settings)
    device = pick_device(settings.runtime)
    present = check_media(listing)
    speed = _flops_per_second(device) if any(m.cut != "input" for m in listing.modalities.values()) else None
    modalities = {
        name: _modality(settings, listing, name, modality, present[name], speed)
        for name, modality in listing.modalities.items()
    }
    lost = {r.clip for r in listing.rejected}
    for name, presence in present.items():
        lost |= {gap.clip for gap in presence.gaps if not _mendable(settings, listing.modalities[name], gap)}
        lost |= {bad["clip"] for bad in modalities[name]["unusable"]}
    counts = _counts(listing)
    needed = sum(one["bytes_to_write"] + one["weights_to_write"] for one in modalities.values())
    free = free_bytes(settings.cache.dir)
    weights = [one["weights"] for one in modalities.values() if one["weights"] and not one["weights"]["present"]]
    exit_code = 0 if settings.dataset.tolerates(len(lost), len(listing.clips) + len(listing.rejected)) else 3
    return {
        "dataset": listing.name,
        "reader": settings.dataset.reader.name,
        "root": str(settings.dataset.root) if settings.dataset.root else None,
        "clips": len(listing.clips) + len(listing.rejected),
        "splits": {split: sum(counts[domain][split] for domain in listing.domains) for split in SPLITS},
        "domains": counts,
        "classes": len(listing.label_names),
        "layout": listing.notes,
        "warnings": listing.warnings,
        "modalities": modalities,
        "clips_to_be_rejected": len(lost),
        "views": settings.cache.views,
        "cache": str(settings.cache.dir / listing.name),
        "bytes": sum(one["bytes"] for one in modalities.values()),
        "bytes_to_write": needed,
        "free_bytes": free,
        "fits": needed <= free,
        "device": str(device),
        "workers": settings.cache.workers,
        "seconds": round(sum(one["seconds"] for one in modalities.values()), 1),
        "exit_code": 1 if weights or needed > free else exit_code,
    }


def _counts(listing: Listing) -> dict[str, dict[str, int]]:
    """Clips per domain and split."""
    clips = listing.clips
    pairs = np.bincount(clips.domains * len(SPLITS) + clips.splits, minlength=len(clips.domain_names) * len(SPLITS))
    table = dict(zip(clips.domain_names, pairs.reshape(-1, len(SPLITS)).tolist(), strict=True))
    return {d: dict(zip(SPLITS, table.get(d, [0] * len(SPLITS)), strict=True)) for d in listing.domains}


def _modality(
    settings: Settings, listing: Listing, name: str, modality: Modality, presence: Presence, speed: float | None
) -> dict[str, Any]:
    weights, sha = _weights(settings, modality)
    plan = plan_cache(settings, listing, name, modality, weights_sha256=sha)
    to_do = plan.to_do(listing.clips)
    left = np.array([i for n in to_do for i in plan.shards[n]], np.int64)
    views = _views(plan, listing.clips.splits)
    views_left = _views(plan, listing.clips.splits[left])
    decoding, timed, unusable = _decode_seconds(settings, listing, name, modality, presence)
    gflop = {group: _gflop(settings, name, modality, group) for group in ("train", "test")}
    work = sum(gflop[group] * count for group, count in views_left.items()) * 1e9
    decode_s = decoding * len(left) / max(settings.cache.workers, 1)
    trunk_s = work / speed if speed and work else 0.0
    return {
        "clips": presence.clips,
        "complete": presence.complete,
        "absent": presence.absent,
        "incomplete": presence.clips - presence.complete - presence.absent,
        "files": presence.files,
        "files_missing": presence.files_missing,
        "gaps": [
            {"clip": g.clip, "missing": g.missing, "expected": g.expected, "first": g.first, "cause": g.cause}
            for g in presence.gaps
        ],
        "unusable": [{"clip": bad.clip, "file": bad.file, "cause": bad.cause} for bad in unusable],
        "encoder": modality.encoder,
        "cut": modality.cut,
        "weights": weights,
        "views": views,
        "bytes_per_view": {group: row_bytes(plan.shapes[group]) for group in ("train", "test")},
        "bytes": int(plan.sizes.sum()),
        "bytes_to_write": plan.bytes_of(to_do),
        "weights_to_write": 0 if (plan.folder / "tail.pt").is_file() else weights_bytes(settings, name, modality),
        "shards": len(plan.shards),
        "shards_there": len(plan.shards) - len(to_do),
        "trunk_gflop": {group: round(value, 2) for group, value in gflop.items()},
        "decode_seconds_per_clip": round(decoding, 4),
        "decode_timed_clips": timed,
        "seconds": round(max(decode_s, trunk_s), 1),  # the two overlap
    }


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


def _weights(settings: Settings, modality: Modality) -> tuple[dict[str, str | bool | None] | None, str | None]:
    """What is known of the weights file, and its SHA-256."""
    if not needs_weights(settings, modality):
        return None, None
    try:
        file = find_weights(modality.encoder, modality.weights, settings.cache.weights_dir)
    except CheckpointError as error:
        return {"present": False, "message": str(error)}, None
    sha = sha256_of(file)
    other = another_file(file, sha, modality.weights_sha256)
    return {"present": other is None, "file": str(file), "sha256": sha, "message": str(other or "")}, sha


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
