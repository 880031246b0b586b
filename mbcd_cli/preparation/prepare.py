"""`mbcd prepare`: reader -> media -> views -> trunk -> cache."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from mbcd_cli import checksums
from mbcd_cli.audit.audit import audit_listing
from mbcd_cli.audit.findings import Leak
from mbcd_cli.checksums import PREPARED_WITH
from mbcd_cli.data.cache import CacheWriter, Finished
from mbcd_cli.data.corruptions import SEVERITIES
from mbcd_cli.data.media.decoding import DecodeJob, Decoder
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.online import MediaSource
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.records import Rejected
from mbcd_cli.encoders import described_encoders
from mbcd_cli.encoders.staged import Trunk
from mbcd_cli.errors import CacheError, CheckpointError
from mbcd_cli.files import free_bytes, size_text, write_rows, write_text
from mbcd_cli.place import this_process
from mbcd_cli.preparation.answer import Prepared, PreparedModality, keep_answer, kept_answer
from mbcd_cli.preparation.cache_plan import Plan, corrupted_plans, corruptions_named, plan_cache, read_listing
from mbcd_cli.preparation.crew import Crew
from mbcd_cli.preparation.filler import Filler
from mbcd_cli.preparation.identity import check_records
from mbcd_cli.preparation.trunk import Frozen, WeightsFile, build_trunk, row_bytes, save_weights, weights_file
from mbcd_cli.processes import wait_for
from mbcd_cli.runtime import configure, pick_device
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings
from mbcd_cli.settings.sources import to_toml

LEFT_OUT = "left-out.csv"
"""Beside a dataset's caches: the clips that were left out, and why."""
PATIENCE = 3600.0
"""Seconds without a new shard after which other processes are no longer waited for."""
_AGAIN = "Run the same command again; it goes on with what is missing."
_SHOWN = 10  # rejected clips of one kind; a dataset that was half downloaded has thousands


def prepare(
    settings: Settings, *, corruptions: Sequence[str] = (), severities: Sequence[int] = SEVERITIES, say: Say = SILENT
) -> Prepared | None:
    """Fill the caches of every modality of a dataset; what is already there is reused.

    Several processes share the shards (`crew`); of those that torchrun started rank 0 alone prints.

    Args:
        corruptions: of the test views, each in a cache of its own at every one of `severities`; `all` are those of
            every modality.

    Returns:
        What was prepared, what was reused and every rejected clip; None in ranks other than 0.

    Raises:
        ManifestError: the dataset's tables are wrong. CheckpointError: weights are missing, or others than expected.
        CacheError: no room for the cache, or no clip can be used. SettingsError: no such corruption.
    """
    configure(settings.runtime)
    started = time.time_ns()
    plain = this_process().world == 1 and not corruptions
    if plain and (kept := kept_answer(settings)) is not None:
        prepared, warnings = kept
        for line in warnings:
            say.warn(line)
        say("Nothing has changed since all of it was prepared.")
        return prepared
    described = described_encoders(settings)
    with say.progress("reading what clips there are"):
        listing = read_listing(described)
    wanted = list(product(corruptions_named(corruptions, listing.modalities), severities))
    prepared = prepare_listing(described, listing, corruptions=wanted, say=say)
    if plain and prepared is not None:
        keep_answer(settings, listing, prepared, started=started)
    return prepared


def leave_out_leaks(settings: Settings, listing: Listing, *, say: Say = SILENT) -> tuple[Settings, list[Leak]]:
    """Take the clips that leak out of a listing, where settings ask for it; the settings that name them, and why.

    Every process of several finds the same ones, and the first tells.
    """
    dataset = settings.dataset
    if dataset.leave_out == "none" or dataset.left_out is not None:
        return settings, []
    leaks = audit_listing(settings, listing, say=say).leaks
    listing.leave_out([leak.clip for leak in leaks])
    named = dataset.model_copy(update={"left_out": tuple(leak.clip for leak in leaks)})
    if this_process().main:
        table = settings.cache.dir / listing.name / LEFT_OUT
        say(f"{len(leaks)} training clips that tell of test clips are left out{f': {table}' if leaks else ''}.")
        if leaks:
            write_rows(table, [asdict(leak) for leak in leaks], place="--cache-dir")
    return settings.model_copy(update={"dataset": named}), leaks


def prepare_listing(
    settings: Settings, listing: Listing, *, corruptions: Collection[tuple[str, int]] = (), say: Say = SILENT
) -> Prepared | None:
    """`prepare`, for clips that are listed already: every modality of `listing` in the cache.

    Args:
        corruptions: kind and severity of every one that the test views are cached with besides.
    """
    place = this_process()
    settings, leaks = leave_out_leaks(settings, listing, say=say)
    if not place.main:
        device = pick_device(settings.runtime)
        for name, modality in listing.modalities.items():
            _prepare_modality(settings, listing, name, modality, device, [], corruptions, say, None)
        return None
    for line in listing.notes:
        say(line)
    for line in listing.warnings:
        say.warn(line)
    device = pick_device(settings.runtime)
    plans = check_beforehand(settings, listing, corruptions, say=say)
    rejected: list[Rejected] = list(listing.rejected)
    total = len(listing.clips) + len({r.clip for r in listing.rejected}.difference(listing.clips.ids))
    done = {
        name: _prepare_modality(settings, listing, name, modality, device, rejected, corruptions, say, plans[name])
        for name, modality in listing.modalities.items()
    }
    bad = sorted({r.clip for r in rejected})
    if rejected:
        say.table(
            f"{len(bad)} of {total} clips rejected",
            ("clip", "modality", "file", "cause", "remedy"),
            _rejected_rows(rejected, settings),
        )
    table = settings.cache.dir / listing.name / "rejected.csv"
    listed = [asdict(bad) for bad in rejected]
    if listed:
        write_rows(table, listed, place="--cache-dir")
    else:
        table.unlink(missing_ok=True)  # of an earlier time
    if len(bad) == total:
        message = f"All {len(bad)} clips of {listing.name} were rejected."
        raise CacheError(message, "The table above says why.", {"clips": total, "rejected": listed})
    return Prepared(
        dataset=listing.name,
        cache=str(settings.cache.dir / listing.name),
        clips=total,
        domains=list(listing.domains),
        target=_target(settings, listing),
        classes=len(listing.label_names),
        modalities=done,
        rejected=rejected,
        left_out=leaks,
        exit_code=0 if settings.dataset.tolerates(len(bad), total) else 3,
    )


def _target(settings: Settings, listing: Listing) -> str:
    """The last domain that can be tested, one that only can be tested before others."""
    splits = listing.clips.splits_of

    def fitness(domain: str) -> tuple[bool, bool]:
        there = splits.get(domain, set())
        return "test" in there or settings.dataset.target_split == "all", "train" not in there

    return max(reversed(listing.domains), key=fitness)


def check_beforehand(
    settings: Settings, listing: Listing, corruptions: Collection[tuple[str, int]] = (), *, say: Say = SILENT
) -> dict[str, Plan]:
    """What would otherwise end the work after hours: the weights of all modalities, and room for all of them.

    Returns:
        The plan of every modality.

    Raises:
        CheckpointError: weights that are missing or another file; those of every modality are named.
        CacheError: the disk cannot take the caches that are still to be written.
    """
    problems: list[CheckpointError] = []
    weights: dict[str, WeightsFile | None] = {}
    for name, modality in listing.modalities.items():
        try:
            weights[name] = weights_file(settings, modality)
        except CheckpointError as error:
            problems.append(error)
    if len(problems) > 1:
        raise CheckpointError("\n".join(map(str, problems)))
    if problems:
        raise problems[0]
    plans = {
        name: plan_cache(settings, listing, name, modality, weights=weights[name], say=say)
        for name, modality in listing.modalities.items()
    }
    needed = sum(plan.bytes_of(plan.to_do(listing.clips)) + plan.weights_to_write for plan in plans.values())
    if corruptions:
        count, extra = corrupted_bytes(settings, listing, plans, corruptions)
        say(f"{count} caches of corrupted test views, of which {size_text(extra)} are to be written")
        needed += extra
    _check_disk(settings.cache.dir / listing.name, needed)
    return plans


def corrupted_bytes(
    settings: Settings, listing: Listing, plans: Mapping[str, Plan], corruptions: Collection[tuple[str, int]]
) -> tuple[int, int]:
    """How many caches of corrupted test views are asked for, and the bytes of what is still to be written of them."""
    clips = listing.clips
    corrupted = [
        plan
        for name, clean in plans.items()
        for plan in corrupted_plans(clean, settings, clips, listing.modalities[name], corruptions)
    ]
    return len(corrupted), sum(plan.bytes_of(plan.to_do(clips)) for plan in corrupted)


def _rejected_rows(rejected: Sequence[Rejected], settings: Settings) -> list[tuple[str, ...]]:
    """Rows of the table of rejected clips: the first of every kind of cause, and how many more there are."""
    kinds: dict[tuple[str, str], list[Rejected]] = {}
    for bad in rejected:
        kinds.setdefault((bad.modality, re.sub(r"\d+", "#", bad.cause)), []).append(bad)
    rows: list[tuple[str, ...]] = []
    for (modality, _), alike in kinds.items():
        rows += [(r.clip, modality, _short(r.file, settings), r.cause, r.remedy) for r in alike[:_SHOWN]]
        if len(alike) > _SHOWN:
            rows.append(
                (f"... and {len(alike) - _SHOWN} more", modality, "", "of the same kind", "rejected.csv lists them")
            )
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
    corruptions: Collection[tuple[str, int]],
    say: Say,
    made: Plan | None,
) -> PreparedModality | None:
    started = time.monotonic()
    frozen = build_trunk(settings, name, modality, say=say)
    plan = plan_cache(settings, listing, name, modality, weights=frozen.source, made=made, say=say)
    clips, folder = listing.clips, plan.folder
    if this_process().main:
        check_records(frozen, modality, folder)
    finished, missing = _make_cache(settings, listing, name, modality, frozen, plan, device, say)
    if len(finished.rejected) == len(clips):
        corruptions = ()
    corrupted = corrupted_plans(plan, settings, clips, modality, corruptions)
    for spoilt in corrupted:
        if spoilt.to_do(clips) or not (spoilt.folder / "index.h5").exists():
            _make_cache(settings, listing, name, modality, replace(frozen, weights={}), spoilt, device, say)
    if not this_process().main:
        return None
    unusable, mended = finished.rejected, finished.mended
    rejected.extend(unusable)
    if mended:
        first = mended[0]
        say.warn(f"{name}: {len(mended)} clips were mended while decoding, the first {first.clip}: {first.note}")
    gone = {bad.clip for bad in unusable}
    there = np.fromiter((identity not in gone for identity in clips.ids), bool, len(clips))
    kept = int(np.array([len(wanted) for wanted in plan.views])[clips.splits[there]].sum())
    state = "reused" if not missing else "prepared"
    seconds = time.monotonic() - started
    nbytes = sum(path.stat().st_size for path in folder.glob("shard-*.h5"))
    error = f", int8 adds {100 * finished.error:.2f} % error" if finished.error is not None else ""
    say(
        f"{name}: {state} {len(clips) - len(unusable)} clips, {kept} views, {nbytes / 1e6:.1f} MB{error} "
        f"in {seconds:.1f} s -> {folder}"
    )
    spoilt_bytes = sum(shard.stat().st_size for spoilt in corrupted for shard in spoilt.folder.glob("shard-*.h5"))
    if corrupted:
        say(f"{name}: {len(corrupted)} caches of corrupted test views, {size_text(spoilt_bytes)}")
    done = PreparedModality(
        folder=str(folder),
        fingerprint=plan.fingerprint,
        clips=len(clips) - len(unusable),
        bytes=nbytes,
        bytes_per_view=row_bytes(plan.shapes["train"]),
        int8_error=finished.error,
        float16_loss=finished.lost,
        mended=mended,
        shards=len(plan.shards),
        shards_reused=len(plan.shards) - len(missing),
        seconds=round(seconds, 3),
        corrupted=len(corrupted),
        corrupted_bytes=spoilt_bytes,
    )
    if done.loss:
        say.warn(f"{name}: {done.loss}")
    return done


def _make_cache(
    settings: Settings,
    listing: Listing,
    name: str,
    modality: Modality,
    frozen: Frozen,
    plan: Plan,
    device: torch.device,
    say: Say,
) -> tuple[Finished, list[int]]:
    """Fill one cache and close it; what it reports, and the shards that were missing."""
    place = this_process()
    agreed = json.dumps([[(span.start, span.stop) for span in plan.shards], settings.cache.compression])
    index = plan.folder / "index.h5"
    with Crew(plan.folder, checksums.of_text(agreed), place) as crew:
        if not crew.lead() and place.world == 1:
            say(f"{name}: another process is filling {plan.folder}; this one takes what is free.")
        writer = writer_of(settings, listing, name, modality, frozen, plan, folder=plan.folder)
        found, missing = _state(index), writer.pending()
        _check_disk(plan.folder, plan.bytes_of(missing))
        label = name if plan.corruption is None else f"{name}, {plan.corruption.folder}"
        label += "" if place.world == 1 else f" (rank {place.rank})"
        left: Sequence[int] = missing
        while left or not crew.lead():
            trunk = frozen.trunk.to(device)
            fill(writer, settings, plan, trunk, left, device=device, label=label, say=say, crew=crew)
            wait_for(
                lambda: [] if crew.lead() else [index],
                named=lambda _: f"the index of {plan.folder}, which another process writes",
                say=say,
                patience=PATIENCE,
                remedy=_AGAIN,
            )
            left = writer.pending()
        crew.clean()
        if _state(index) not in (None, found):  # another process has written it since
            return writer.finished(listing.rejected), missing
        for file, weights in frozen.weights.items():
            save_weights(plan.folder / file, weights)
        finished = close_cache(writer, settings, listing.rejected)
        if len(finished.rejected) == len(listing.clips):  # nothing anybody could use, in the way of a right one
            shutil.rmtree(plan.folder, ignore_errors=True)  # another process may put its lock there again
    return finished, missing


def _state(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that had its name before; None where there is none."""
    try:
        told = path.stat()
    except FileNotFoundError:
        return None
    return told.st_ino, told.st_mtime_ns


def writer_of(
    settings: Settings, listing: Listing, name: str, modality: Modality, frozen: Frozen, plan: Plan, *, folder: Path
) -> CacheWriter:
    """What writes the cache of one modality into `folder`."""
    weights = frozen.source
    return CacheWriter(
        folder,
        recipe=plan.recipe,
        # Runs keep this digest with their settings, so that new data never meets another trunk.
        modality=modality if weights is None else modality.model_copy(update={"weights_sha256": weights.sha256}),
        clips=listing.clips,
        shards=plan.shards,
        domains=listing.domains,
        label_names=listing.label_names,
        provenance={
            "dataset": listing.name,
            "reader": settings.dataset.reader.name,
            # Evaluation looks there for sound, from wherever it is started.
            "root": str((settings.dataset.root or Path()).resolve()),
            "encoder": modality.encoder if frozen.trunk.names else "none (decoded tensors)",
            "weights_sha256": "none" if weights is None else weights.sha256,
            "torch_version": str(torch.__version__),
        },
        compression=settings.cache.compression,
        passport=None if frozen.passport is None else frozen.passport.to_json(),
        online=MediaSource.of(settings, listing.clips, name).to_json()
        if settings.cache.views == 0 and plan.corruption is None
        else None,
    )


def fill(
    writer: CacheWriter,
    settings: Settings,
    plan: Plan,
    trunk: Trunk,
    shards: Sequence[int],
    *,
    device: torch.device,
    label: str,
    say: Say,
    crew: Crew | None = None,
) -> None:
    """Decode, compute and write some shards of a cache.

    Args:
        trunk: on `device`.
        label: of the progress.
        crew: with other processes; shards that these write are waited for. None where this process is alone.
    """
    job = DecodeJob(
        str(writer.recipe["modality"]), writer.modality, settings.dataset, settings.cache.seed, plan.corruption
    )
    column = writer.clips.media[job.name]
    # A row is read sooner than another process is told of it.
    workers = 0 if column.packed == len(column) else settings.cache.workers
    with Decoder(workers=workers, job=job) as decoder:
        tries = plan.corruption is None
        filler = Filler(writer, decoder, writer.clips, plan.views, trunk, plan.shapes, device, tries=tries)
        with say.progress(label, sum(len(filler.decoded(number)) for number in shards)) as ticker:
            if crew is None:
                filler.run(shards, ticker)
                return
            left = list(shards)
            while left:
                filler.run(crew.free(left, writer.is_done), ticker, done=crew.give)
                gone = [number for number in left if writer.is_done(number)]
                ticker.advance(sum(len(filler.decoded(number)) for number in gone if number not in crew.done))
                left = sorted({*left}.difference(gone))
                wait_for(
                    lambda left=left: [] if crew.any_free(left) else left,
                    named=lambda left: f"{len(left)} shards that other processes have taken",
                    say=say,
                    patience=PATIENCE,
                    remedy=_AGAIN,
                )


def close_cache(writer: CacheWriter, settings: Settings, unlisted: Sequence[Rejected]) -> Finished:
    """The index over all shards, and the settings that they were made with.

    Args:
        unlisted: as `CacheWriter.finish` takes them.
    """
    kept = anywhere(settings)
    write_text(writer.folder / PREPARED_WITH, to_toml(kept, stamped=True), place="--cache-dir")
    return writer.finish(unlisted, settings=to_toml(kept))


def anywhere(settings: Settings) -> Settings:
    """The settings with absolute folders: a cache can be repaired from wherever that is asked for."""
    root, cache = settings.dataset.root, settings.cache
    dataset = settings.dataset.model_copy(update={"root": root and root.expanduser().resolve()})
    folders = {"dir": cache.dir.resolve(), "weights_dir": cache.weights_dir and cache.weights_dir.resolve()}
    return settings.model_copy(update={"dataset": dataset, "cache": cache.model_copy(update=folders)})


def _check_disk(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if needed > free:
        raise CacheError(
            f"The cache needs {size_text(needed)} more, and {folder} has {size_text(free)} free.",
            "Free some space, name another disk with --cache-dir, or store fewer views (--set cache.views=1).",
        )
