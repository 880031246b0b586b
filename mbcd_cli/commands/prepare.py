"""`mbcd prepare`: reader -> media -> views -> trunk -> cache."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mbcd_cli import console
from mbcd_cli.commands.filling import (
    Filler,
    Shapes,
    build_trunk,
    cached_shapes,
    needs_weights,
    row_bytes,
    save_weights,
    weights_bytes,
)
from mbcd_cli.data import ranks
from mbcd_cli.data.cache import (
    GROUPS,
    CacheWriter,
    fingerprint,
    group_of,
    is_done,
    recipe_of,
    shard_ranges,
    views_of,
)
from mbcd_cli.data.media.decoding import DecodeJob, Decoder
from mbcd_cli.data.modalities import default_modality
from mbcd_cli.data.modalities.base import Modality
from mbcd_cli.data.online import describe_media
from mbcd_cli.data.ranks import free_bytes, locked
from mbcd_cli.data.readers import Listing, read_dataset
from mbcd_cli.data.records import Clip, Rejected
from mbcd_cli.encoders.pretrained import checked_weights
from mbcd_cli.errors import CacheError, CheckpointError, ManifestError
from mbcd_cli.processes import this_process, wait_for
from mbcd_cli.runtime import pick_device
from mbcd_cli.settings import Settings

_SHOWN = 10  # rejected clips of one kind; a dataset that was half downloaded has thousands


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
    listing.survey()
    return listing


def prepare(settings: Settings) -> dict[str, Any]:
    """Fill the caches of every modality of a dataset; what is already there is reused.

    Started by torchrun, the processes share the shards; rank 0 alone writes the indices, and prints.

    Returns:
        A JSON-able summary: clips, domains, per modality the folder, bytes and what was reused, and every rejected
        clip; `exit_code` is 3 when more clips were rejected than `dataset.max_bad`. Nothing in ranks other than 0.
    """
    return prepare_listing(settings, read_listing(settings))


def prepare_listing(settings: Settings, listing: Listing) -> dict[str, Any]:
    """`prepare`, for clips that are listed already: every modality of `listing` in the cache."""
    place = this_process()
    if not place.main:
        device = pick_device(settings.runtime)
        for name, modality in listing.modalities.items():
            _prepare_modality(settings, listing, name, modality, device, [])
        return {}
    for line in listing.notes:
        console.say(line)
    for line in listing.warnings:
        console.warn(line)
    device = pick_device(settings.runtime)
    check_beforehand(settings, listing)
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
            _rejected_rows(rejected, settings),
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
) -> dict[str, Any]:
    started = time.monotonic()
    place = this_process()
    frozen = build_trunk(settings, name, modality)
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
            console.progress(name if place.world == 1 else f"{name} (rank {place.rank})", total) as ticker,
        ):
            filler = Filler(writer, decoder, clips, views, trunk, plan.shapes, device)
            filler.run(pending, ticker)
        if not place.main:
            return {}
        wait_for(
            writer.pending,
            named=lambda left: f"{len(left)} shards of process {sorted({shard % place.world for shard in left})}",
            say=console.say,
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
        console.warn(
            f"{name}: {len(mended)} clips were mended while decoding, the first {mended[0][0]}: {mended[0][1]}"
        )
    if finished.lost:
        console.warn(f"{name}: {finished.lost}. --set cache.dtype=float32 keeps them as they are.")
    gone = {r.clip for r in found}
    kept = sum(len(wanted) for clip, wanted in zip(clips, views, strict=True) if clip.id not in gone)
    state = "reused" if not missing else "prepared"
    seconds = time.monotonic() - started
    nbytes = sum(path.stat().st_size for path in folder.glob("shard-*.h5"))
    error = f", int8 adds {100 * finished.error:.2f} % error" if finished.error is not None else ""
    console.say(
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


def make_plan(
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


def _check_disk(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if needed > free:
        raise CacheError(
            f"The cache needs {needed / 1e9:.1f} GB more, and {folder} has {free / 1e9:.1f} GB free.",
            "Free some space, name another disk with --cache-dir, or store fewer views (--set cache.views=1).",
        )


def show(result: dict[str, Any], *, preset: str | None, repeat: Sequence[str] = ()) -> None:
    """Print what `prepare` returned and what to run next.

    Args:
        preset: that it was run with.
        repeat: words of its command line that `train` needs too, to mean the same cache.
    """
    columns = ["modality", "clips", "MB", "bytes per view", "shards", "reused", "seconds"]
    squeezed = any(done["int8_error"] is not None for done in result["modalities"].values())
    rows = []
    for name, done in result["modalities"].items():
        row = [name, done["clips"], f"{done['bytes'] / 1e6:.1f}", done["bytes_per_view"]]
        row += [done["shards"], done["shards_reused"], f"{done['seconds']:.1f}"]
        if squeezed:
            row.append("-" if done["int8_error"] is None else f"{100 * done['int8_error']:.2f}%")
        rows.append(row)
    console.table(
        f"{result['dataset']}: {result['clips']} clips, {result['classes']} classes, "
        f"domains {', '.join(result['domains'])}",
        columns + (["int8 error"] if squeezed else []),
        rows,
    )
    bad = len({r["clip"] for r in result["rejected"]})
    if result["exit_code"]:
        console.say(
            f"error: {bad} clips were rejected, and --max-bad allows fewer; the other clips are prepared.\n"
            f"Mend the files in the table above, or run again with --max-bad {bad}."
        )
        return
    named = ["--preset", preset] if preset else ["--dataset", result["dataset"]]
    console.say(f"Next: mbcd train {shlex.join([*named, '--target-domain', result['domains'][-1], *repeat])}")
