"""`mbcd prepare`: reader -> media -> views -> trunk -> cache."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mbcd_cli.data import ranks
from mbcd_cli.data.cache import (
    CacheWriter,
)
from mbcd_cli.data.media.decoding import DecodeJob, Decoder
from mbcd_cli.data.modalities.base import Modality
from mbcd_cli.data.online import describe_media
from mbcd_cli.data.ranks import free_bytes, locked
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.records import Rejected
from mbcd_cli.encoders.pretrained import checked_weights
from mbcd_cli.errors import CacheError, CheckpointError
from mbcd_cli.preparation.cache_plan import make_plan, read_listing
from mbcd_cli.preparation.filler import Filler
from mbcd_cli.preparation.trunk import (
    build_trunk,
    needs_weights,
    row_bytes,
    save_weights,
    weights_bytes,
)
from mbcd_cli.processes import this_process, wait_for
from mbcd_cli.runtime import pick_device
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings

_SHOWN = 10  # rejected clips of one kind; a dataset that was half downloaded has thousands


def prepare(settings: Settings, *, say: Say = SILENT) -> dict[str, Any]:
    """Fill the caches of every modality of a dataset; what is already there is reused.

    Started by torchrun, the processes share the shards; rank 0 alone writes the indices, and prints.

    Returns:
        A JSON-able summary: clips, domains, per modality the folder, bytes and what was reused, and every rejected
        clip; `exit_code` is 3 when more clips were rejected than `dataset.max_bad`. Nothing in ranks other than 0.
    """
    return prepare_listing(settings, read_listing(settings), say=say)


def prepare_listing(settings: Settings, listing: Listing, *, say: Say = SILENT) -> dict[str, Any]:
    """`prepare`, for clips that are listed already: every modality of `listing` in the cache."""
    place = this_process()
    if not place.main:
        device = pick_device(settings.runtime)
        for name, modality in listing.modalities.items():
            _prepare_modality(settings, listing, name, modality, device, [], say)
        return {}
    for line in listing.notes:
        say(line)
    for line in listing.warnings:
        say.warn(line)
    device = pick_device(settings.runtime)
    check_beforehand(settings, listing)
    rejected: list[Rejected] = list(listing.rejected)
    total = len({c.id for c in listing.clips} | {r.clip for r in listing.rejected})
    done: dict[str, Any] = {}
    for name, modality in listing.modalities.items():
        done[name] = _prepare_modality(settings, listing, name, modality, device, rejected, say)
    bad = sorted({r.clip for r in rejected})
    if rejected:
        say.table(
            f"{len(bad)} of {total} clips rejected",
            ("clip", "modality", "file", "cause", "remedy"),
            _rejected_rows(rejected, settings),
        )
    listed = [
        {"clip": r.clip, "modality": r.modality, "file": r.file, "cause": r.cause, "remedy": r.remedy} for r in rejected
    ]
    if len(bad) == total:
        message = f"All {len(bad)} clips of {listing.name} were rejected."
        raise CacheError(message, "The table above says why.", {"clips": total, "rejected": listed})
    return {
        "dataset": listing.name,
        "cache": str(settings.cache.dir / listing.name),
        "clips": total,
        "domains": list(listing.domains),
        "classes": len(listing.label_names),
        "modalities": done,
        "rejected": listed,
        "exit_code": 3 if len(bad) > settings.dataset.max_bad else 0,
    }


def check_beforehand(settings: Settings, listing: Listing) -> None:
    """What would otherwise end the work after hours: the weights of all modalities, and room for all of them.

    Raises:
        CheckpointError: weights that are missing or another file; those of every modality are named.
        CacheError: the disk cannot take the caches that are still to be written.
    """
    problems: list[CheckpointError] = []
    needed = 0
    for name, modality in listing.modalities.items():
        sha = None
        if needs_weights(settings, modality):
            try:
                where = (modality.weights, settings.cache.weights_dir, modality.weights_sha256)
                _, sha = checked_weights(modality.encoder, *where)
            except CheckpointError as error:
                problems.append(error)
                continue
        plan = make_plan(settings, listing, name, modality, weights_sha256=sha)
        left = plan.to_do(listing.clips)
        needed += sum(plan.sizes[i] for n in left for i in plan.shards[n])
        if not (plan.folder / "tail.pt").is_file():
            needed += weights_bytes(settings, name, modality)
    if len(problems) > 1:
        raise CheckpointError("\n".join(map(str, problems)))
    if problems:
        raise problems[0]
    _check_disk(settings.cache.dir / listing.name, needed)


def _rejected_rows(rejected: Sequence[Rejected], settings: Settings) -> list[tuple[str, ...]]:
    """Rows of the table of rejected clips: the first of every kind of cause, and how many more there are."""
    kinds: dict[tuple[str, str], list[Rejected]] = {}
    for bad in rejected:
        kinds.setdefault((bad.modality, re.sub(r"\d+", "#", bad.cause)), []).append(bad)
    rows: list[tuple[str, ...]] = []
    for (modality, _), alike in kinds.items():
        rows += [(r.clip, modality, _short(r.file, settings), r.cause, r.remedy) for r in alike[:_SHOWN]]
        if len(alike) > _SHOWN:
            rows.append((f"... and {len(alike) - _SHOWN} more", modality, "", "of the same kind", "--json lists them"))
    return rows


def _short(file: str, settings: Settings) -> str:
    root = settings.dataset.root
    return str(Path(file).relative_to(root)) if root and Path(file).is_relative_to(root) else file


def _prepare_modality(
    settings: Settings,
    listing: Listing,
    name: str,
    modality: Modality,
    device: torch.device,
    rejected: list[Rejected],
    say: Say,
) -> dict[str, Any]:
    started = time.monotonic()
    place = this_process()
    frozen = build_trunk(settings, name, modality, say=say)
    trunk, sha = frozen.trunk, frozen.sha256
    plan = make_plan(settings, listing, name, modality, weights_sha256=sha)
    root, clips, views, folder = settings.dataset.root or Path(), listing.clips, plan.views, plan.folder
    online = describe_media(settings, clips, name) if settings.cache.views == 0 else None
    with locked(folder, place):
        writer = CacheWriter(
            folder,
            recipe=plan.recipe,
            # Runs keep this digest with their settings, so that new data never meets another trunk.
            modality=modality if sha is None else modality.model_copy(update={"weights_sha256": sha}),
            clips=clips,
            shards=plan.shards,
            domains=listing.domains,
            label_names=listing.label_names,
            provenance={
                "dataset": listing.name,
                "reader": settings.dataset.reader.name,
                "root": str(root.resolve()),  # evaluation looks there for sound, from wherever it is started
                "encoder": modality.encoder if trunk.names else "none (decoded tensors)",
                "weights_sha256": sha or "none",
                "torch_version": str(torch.__version__),
            },
            compression=settings.cache.compression,
            place=place,
            online=online,
        )
        missing = writer.pending()
        pending = [number for number in missing if place.owns(number)]
        if place.main:
            _check_disk(folder, sum(plan.sizes[i] for n in missing for i in plan.shards[n]))
        job = DecodeJob(name, modality, settings.dataset, settings.cache.seed)
        trunk.to(device)
        total = sum(len(plan.shards[n]) for n in pending)
        with (
            Decoder(workers=settings.cache.workers, job=job) as decoder,
            say.progress(name if place.world == 1 else f"{name} (rank {place.rank})", total) as ticker,
        ):
            filler = Filler(writer, decoder, clips, views, trunk, plan.shapes, device)
            filler.run(pending, ticker)
        if not place.main:
            return {}
        wait_for(
            writer.pending,
            named=lambda left: f"{len(left)} shards of process {sorted({shard % place.world for shard in left})}",
            say=say,
            patience=ranks.PATIENCE,
            remedy="Run the same command again; it goes on with what is missing.",
        )
        for file, weights in frozen.weights.items():
            save_weights(folder / file, weights)
        lost = "; ".join(filter(None, map(str, filler.roundings.values())))
        finished = writer.finish(listing.rejected, lost=lost)
        if len(finished.rejected) == len(clips):  # nothing that anybody could use, and in the way of a right one
            shutil.rmtree(folder)
    found, mended = finished.rejected, finished.mended
    rejected.extend(found)
    if mended:
        say.warn(f"{name}: {len(mended)} clips were mended while decoding, the first {mended[0][0]}: {mended[0][1]}")
    if finished.lost:
        say.warn(f"{name}: {finished.lost}. --set cache.dtype=float32 keeps them as they are.")
    gone = {r.clip for r in found}
    kept = sum(len(wanted) for clip, wanted in zip(clips, views, strict=True) if clip.id not in gone)
    state = "reused" if not missing else "prepared"
    seconds = time.monotonic() - started
    nbytes = sum(path.stat().st_size for path in folder.glob("shard-*.h5"))
    error = f", int8 adds {100 * finished.error:.2f} % error" if finished.error is not None else ""
    say(
        f"{name}: {state} {len(clips) - len(found)} clips, {kept} views, {nbytes / 1e6:.1f} MB{error} "
        f"in {seconds:.1f} s -> {folder}"
    )
    return {
        "folder": str(folder),
        "fingerprint": plan.fingerprint,
        "clips": len(clips) - len(found),
        "bytes": nbytes,
        "bytes_per_view": row_bytes(plan.shapes["train"]),
        "int8_error": finished.error,
        "float16_loss": finished.lost,
        "mended": [{"clip": clip, "note": note} for clip, note in mended],
        "shards": len(writer.shards),
        "shards_reused": len(writer.shards) - len(missing),
        "seconds": round(seconds, 3),
    }


def _check_disk(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if needed > free:
        raise CacheError(
            f"The cache needs {needed / 1e9:.1f} GB more, and {folder} has {free / 1e9:.1f} GB free.",
            "Free some space, name another disk with --cache-dir, or store fewer views (--set cache.views=1).",
        )
