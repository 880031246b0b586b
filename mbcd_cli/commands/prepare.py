"""`mbcd prepare`: reader -> media -> views -> trunk -> cache."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbcd_cli import console
from mbcd_cli.data.cache import (
    GROUPS,
    CacheWriter,
    Rows,
    Shard,
    fingerprint,
    group_of,
    locked,
    recipe_of,
    shard_ranges,
    views_of,
)
from mbcd_cli.data.decoding import DecodeJob, Decoder
from mbcd_cli.data.readers import Listing, read_dataset
from mbcd_cli.data.records import Clip, Rejected
from mbcd_cli.data.views import part_shapes, resolve
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.pretrained import find_weights, load_pretrained
from mbcd_cli.encoders.staged import Trunk
from mbcd_cli.errors import CacheError
from mbcd_cli.runtime import pick_device
from mbcd_cli.settings import Modality, Settings, default_modality


def read_listing(settings: Settings) -> Listing:
    """The clips of `settings.dataset`, modalities resolved as far as files tell.

    Raises:
        SettingsError: no such reader.
        ManifestError: the dataset's tables are wrong.
    """
    wanted = dict(settings.modalities)
    if settings.model.modalities:
        wanted = {name: wanted.get(name) or default_modality(name) for name in settings.model.modalities}
    listing = read_dataset(settings.dataset, wanted)
    listing.modalities = {
        name: resolve(modality, [clip.media[name] for clip in listing.clips if name in clip.media])
        for name, modality in listing.modalities.items()
    }
    return listing


def prepare(settings: Settings) -> dict[str, Any]:
    """Fill the caches of every modality of a dataset; what is already there is reused.

    Returns:
        A JSON-able summary: clips, domains, per modality the folder, bytes and what was reused, and every rejected
        clip; `exit_code` is 3 when more clips were rejected than `dataset.max_bad`.
    """
    return prepare_listing(settings, read_listing(settings))


def prepare_listing(settings: Settings, listing: Listing) -> dict[str, Any]:
    """`prepare`, for clips that are listed already: every modality of `listing` in the cache."""
    for line in listing.notes:
        console.say(line)
    for line in listing.warnings:
        console.warn(line)
    device = pick_device(settings.runtime)
    rejected: list[Rejected] = list(listing.rejected)
    total = len({c.id for c in listing.clips} | {r.clip for r in listing.rejected})
    done: dict[str, Any] = {}
    for name, modality in listing.modalities.items():
        done[name] = _prepare_modality(settings, listing, name, modality, device, rejected)
    bad = sorted({r.clip for r in rejected})
    if rejected:
        console.table(
            f"{len(bad)} of {total} clips rejected",
            ("clip", "modality", "file", "cause", "remedy"),
            [(r.clip, r.modality, _short(r.file, settings), r.cause, r.remedy) for r in rejected],
            to_stderr=True,
        )
    if len(bad) == total:
        raise CacheError(f"All {len(bad)} clips of {listing.name} were rejected.", "The table above says why.")
    return {
        "dataset": listing.name,
        "cache": str(settings.cache.dir / listing.name),
        "clips": total,
        "domains": list(listing.domains),
        "classes": len(listing.label_names),
        "modalities": done,
        "rejected": [
            {"clip": r.clip, "modality": r.modality, "file": r.file, "cause": r.cause, "remedy": r.remedy}
            for r in rejected
        ],
        "exit_code": 3 if len(bad) > settings.dataset.max_bad else 0,
    }


def _short(file: str, settings: Settings) -> str:
    root = settings.dataset.root
    return str(Path(file).relative_to(root)) if root and Path(file).is_relative_to(root) else file


def _trunk(settings: Settings, name: str, modality: Modality) -> tuple[Trunk, dict[str, torch.Tensor], str | None]:
    """The frozen trunk, the tail's initial weights ({}: drawn by `train`) and the SHA-256 of the weights file.

    Raises:
        CheckpointError: weights that are missing, damaged or another encoder's; a trunk is never silently random.
    """
    torch.manual_seed(settings.cache.seed)
    encoder = build_encoder(name, modality)
    trunk, tail = encoder.cut(modality.cut)
    if modality.cut == "input" and modality.weights is None:
        return trunk, {}, None
    sha = None
    if not settings.cache.random_weights:
        file = find_weights(modality.encoder, modality.weights, settings.cache.weights_dir)
        sha = load_pretrained(encoder, modality.encoder, file, sha256=modality.weights_sha256).sha256
        console.say(f"{name}: {modality.encoder} with the weights of {file} (SHA-256 {sha[:8]}...)")
    return trunk, tail.state_dict(), sha


def _prepare_modality(
    settings: Settings,
    listing: Listing,
    name: str,
    modality: Modality,
    device: torch.device,
    rejected: list[Rejected],
) -> dict[str, Any]:
    started = time.monotonic()
    trunk, tail_weights, sha = _trunk(settings, name, modality)
    recipe = recipe_of(settings, name, modality, weights_sha256=sha)
    root = settings.dataset.root or Path()
    clips = listing.clips
    digest = fingerprint(recipe, clips, name=name, root=root)
    folder = settings.cache.dir / listing.name / f"{name}-{digest}"
    views = [views_of(clip, views=settings.cache.views, test_view=settings.dataset.target_split) for clip in clips]
    shapes = {group: _cached_shapes(trunk, modality, settings, group) for group in GROUPS}
    row_bytes = {g: sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes[g]) for g in GROUPS}
    sizes = [sum(row_bytes[group_of(view)] for view in wanted) for wanted in views]
    with locked(folder):
        writer = CacheWriter(
            folder,
            recipe=recipe,
            # Runs keep this digest with their settings, so that new data never meets another trunk.
            modality=modality if sha is None else modality.model_copy(update={"weights_sha256": sha}),
            clips=clips,
            shards=shard_ranges(sizes, limit=settings.cache.shard_clips),
            domains=listing.domains,
            label_names=listing.label_names,
            provenance={
                "dataset": listing.name,
                "reader": settings.dataset.reader,
                "root": str(root.resolve()),  # evaluation looks there for sound, from wherever it is started
                "encoder": modality.encoder if modality.cut != "input" else "none (decoded tensors)",
                "weights_sha256": sha or "none",
                "torch_version": str(torch.__version__),
            },
            compression=settings.cache.compression,
        )
        pending = writer.pending()
        _check_disk(folder, sum(sizes[i] for n in pending for i in writer.shards[n]))
        job = DecodeJob(name, modality, settings.dataset, settings.cache.seed)
        trunk.to(device)
        total = sum(len(writer.shards[n]) for n in pending)
        with (
            Decoder(workers=settings.cache.workers, job=job) as decoder,
            console.progress(name, total) as ticker,
        ):
            for number in pending:
                items = [(index, clips[index], views[index]) for index in writer.shards[number]]
                writer.write_shard(number, _fill(decoder, items, trunk, shapes, device, ticker))
        if tail_weights:
            _save_tail(folder / "tail.pt", tail_weights)
        found, mended = writer.finish(listing.rejected)
    rejected.extend(found)
    if mended:
        console.warn(
            f"{name}: {len(mended)} clips were mended while decoding, the first {mended[0][0]}: {mended[0][1]}"
        )
    state = "reused" if not pending else "prepared"
    seconds = time.monotonic() - started
    nbytes = sum(path.stat().st_size for path in folder.glob("shard-*.h5"))
    console.say(
        f"{name}: {state} {len(clips) - len(found)} clips, {sum(map(len, views))} views, {nbytes / 1e6:.1f} MB "
        f"in {seconds:.1f} s -> {folder}"
    )
    return {
        "folder": str(folder),
        "fingerprint": digest,
        "clips": len(clips) - len(found),
        "bytes": nbytes,
        "bytes_per_view": row_bytes["train"],
        "mended": [{"clip": clip, "note": note} for clip, note in mended],
        "shards": len(writer.shards),
        "shards_reused": len(writer.shards) - len(pending),
        "seconds": round(seconds, 3),
    }


Shapes = list[tuple[tuple[int, ...], np.dtype]]


def _cached_shapes(trunk: Trunk, modality: Modality, settings: Settings, group: str) -> Shapes:
    """Shape and dtype of one row of every part at the cut, found by running the trunk on zeros."""
    inputs = part_shapes(modality, test=group == "test")
    stored = np.dtype(settings.cache.dtype)
    if not trunk.names:
        return [(shape, dtype if dtype == np.uint8 else stored) for shape, dtype in inputs]
    zeros = tuple(torch.from_numpy(np.zeros((1, *shape), dtype)) for shape, dtype in inputs)
    return [(tuple(part.shape[1:]), stored) for part in trunk(zeros)]


def _fill(
    decoder: Decoder,
    items: Sequence[tuple[int, Clip, list[int]]],
    trunk: Trunk,
    shapes: dict[str, Shapes],
    device: torch.device,
    ticker: console.Ticker,
) -> Shard:
    """Decode a shard's clips, run the trunk on their views and collect the rows."""
    rows = {}
    for group in GROUPS:
        count = sum(group_of(view) == group for _, _, views in items for view in views)
        parts = [np.empty((count, *shape), dtype) for shape, dtype in shapes[group]]
        rows[group] = Rows(parts, np.empty(count, np.int32), np.empty(count, np.int16))
    filled = dict.fromkeys(GROUPS, 0)
    shard = Shard(rows, [], [])
    names = {index: clip.id for index, clip, _ in items}
    for decoded in decoder.run(items):
        ticker.advance()
        if decoded.rejected is not None:
            shard.rejected.append(decoded.rejected)
            continue
        shard.mended.extend((names[decoded.index], note) for note in decoded.notes)
        for group in GROUPS:
            chosen = [i for i, view in enumerate(decoded.views) if group_of(view) == group]
            if not chosen:
                continue
            stacked = [np.stack(column) for column in zip(*(decoded.parts[i] for i in chosen), strict=True)]
            if trunk.names:
                tensors = tuple(torch.from_numpy(array).to(device) for array in stacked)
                stacked = [part.float().cpu().numpy() for part in trunk(tensors)]
            at = slice(filled[group], filled[group] + len(chosen))
            for target, source in zip(rows[group].parts, stacked, strict=True):
                with np.errstate(over="ignore"):
                    target[at] = source
                if target.dtype.kind == "f" and not np.isfinite(target[at]).all():
                    raise CacheError(
                        f"Clip {names[decoded.index]}: values do not fit {target.dtype}.",
                        "Prepare with --set cache.dtype=float32.",
                    )
            rows[group].clips[at] = decoded.index
            rows[group].views[at] = [decoded.views[i] for i in chosen]
            filled[group] = at.stop
    for group, count in filled.items():
        full = rows[group]
        rows[group] = Rows([part[:count] for part in full.parts], full.clips[:count], full.views[:count])
    return shard


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"The cache needs {needed / 1e9:.1f} GB more, and {folder} has {free / 1e9:.1f} GB free.",
            "Free some space, name another disk with --cache-dir, or store fewer views (--set cache.views=1).",
        )


def _save_tail(path: Path, weights: dict[str, torch.Tensor]) -> None:
    aside = path.with_name(path.name + ".partial")
    torch.save({key: value.cpu() for key, value in weights.items()}, aside)
    aside.replace(path)


def show(result: dict[str, Any], *, preset: str | None) -> None:
    """Print what `prepare` returned and what to run next."""
    console.table(
        f"{result['dataset']}: {result['clips']} clips, {result['classes']} classes, "
        f"domains {', '.join(result['domains'])}",
        ("modality", "clips", "MB", "bytes per view", "shards", "reused", "seconds"),
        [
            (
                name,
                done["clips"],
                f"{done['bytes'] / 1e6:.1f}",
                done["bytes_per_view"],
                done["shards"],
                done["shards_reused"],
                f"{done['seconds']:.1f}",
            )
            for name, done in result["modalities"].items()
        ],
    )
    bad = len({r["clip"] for r in result["rejected"]})
    if result["exit_code"]:
        console.say(
            f"error: {bad} clips were rejected, and --max-bad allows fewer; the other clips are prepared.\n"
            f"Mend the files in the table above, or run again with --max-bad {bad}."
        )
        return
    name = f"--preset {preset}" if preset else f"--dataset {result['dataset']}"
    console.say(f"Next: mbcd train {name} --target-domain {result['domains'][-1]}")
