"""`mbcd prepare`: flags, one library call, what it returned."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import (
    Asked,
    Jobs,
    Launcher,
    RayAddress,
    Reply,
    SlurmOptions,
    command,
    emit_settings,
    preset_for_reader,
)
from mbcd_cli.errors import UsageError

if TYPE_CHECKING:
    from mbcd_cli.preparation.answer import Prepared
    from mbcd_cli.preparation.check import Checked

_PREPARES = [
    "dataset.reader",
    "dataset.root",
    "dataset.reader.manifest",
    "dataset.name",
    "model.modalities",
    "dataset.compute_flow",
    "cache.views",
    "cache.workers",
    "dataset.max_bad",
    "dataset.missing_frames",
    "cache.weights_dir",
    "cache.random_weights",
]


@command(
    *_PREPARES,
    preset=True,
    show_settings=True,
    examples=(
        "mbcd prepare manifest --root data/av-digits",
        "mbcd prepare demo --modalities video,audio,flow",
        "mbcd prepare manifest --root data/mine --compute-flow --set cache.views=8",
        "mbcd prepare epic-kitchens --root EPIC --check",
        "mbcd prepare demo --corruptions all --severities 1,3,5",
        "mbcd prepare epic-kitchens --root EPIC --jobs 4",
        "mbcd prepare epic-kitchens --root EPIC --launcher slurm --jobs 16",
    ),
)
def prepare(
    asked: Asked,
    show_settings: bool = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only say what is there, what is missing, how much space and time it takes.")
    ] = False,
    corruptions: Annotated[
        str | None,
        typer.Option("--corruptions", help="Cache corrupted test views besides: all, or names, e.g. fog,white-noise."),
    ] = None,
    severities: Annotated[str, typer.Option("--severities", help="Of those corruptions, from 1 to 5.")] = "1,2,3,4,5",
    jobs: Jobs = 1,
    launcher: Launcher = "local",
    slurm: SlurmOptions = None,
    ray_address: RayAddress = None,
) -> Reply | None:
    """Decode a dataset once, run the frozen trunks, fill the cache.

    With --jobs, several processes share the work; whoever gives the same command elsewhere takes part, too.

    Bad clips are reported and left out. What is prepared already is reused; a killed run resumes.
    """
    preset = preset_for_reader(asked)
    if preset is not None and asked.preset is None:
        console.say(f"Using preset {preset} (--preset none for the bare defaults).")
    if not show_settings:
        from mbcd_cli.data.readers.places import check_root

        check_root(asked.flags["dataset.reader"], asked.flags.get("dataset.root"))
    spoilt = {
        "corruptions": tuple(name.strip() for name in (corruptions or "").split(",") if name.strip()),
        "severities": _severities(severities),
    }
    settings = asked.resolve(preset)
    if show_settings:
        return emit_settings(settings, as_json=asked.as_json)
    from mbcd_cli.launch.engines import Launching
    from mbcd_cli.preparation import check as checking
    from mbcd_cli.preparation.launched import prepare_launched
    from mbcd_cli.preparation.prepare import prepare

    if check:
        report = checking.check(settings, **spoilt)
        return report, partial(show_check, report)
    if (jobs, launcher) == (1, "local"):
        result = prepare(settings, **spoilt, say=console.terminal)
    else:
        how = Launching(jobs, launcher, slurm or (), None, ray_address)
        result = prepare_launched(settings, how=how, **spoilt, say=console.terminal)
    if result is None:  # rank 0 of several processes tells
        return None
    repeat = _repeated(asked, layered=bool(preset))
    if "dataset.name" in asked.flags or result.dataset != (preset and Path(preset).stem):
        repeat = ["--dataset", result.dataset, *repeat]
    return result, partial(show_prepared, result, preset=preset, repeat=repeat)


def _severities(text: str) -> tuple[int, ...]:
    from mbcd_cli.data.corruptions import SEVERITIES

    told = tuple(part.strip() for part in text.split(","))
    if not set(told) <= set(map(str, SEVERITIES)):
        raise UsageError(f"--severities {text}: they are whole numbers from 1 to 5.", "For example --severities 1,3,5.")
    return tuple(sorted(set(map(int, told))))


_MEANT = ("cache.views", "dataset.missing_frames")
"""Flags of `prepare` that `train` has to be told as settings."""


def _repeated(asked: Asked, *, layered: bool) -> list[str]:
    """What `train` must be told as `prepare` was, so that it means the same cache."""
    words = [] if asked.config is None else ["--config", str(asked.config)]
    for flag, setting in (("--modalities", "model.modalities"), ("--cache-dir", "cache.dir")):
        words += [flag, str(asked.flags[setting])] if setting in asked.flags else []
    if not (layered or asked.config):
        return words
    sets = [*asked.sets, *(f"{key}={asked.flags[key]}" for key in _MEANT if key in asked.flags)]
    from mbcd_cli.settings import role_of

    parts = ("cache.", "dataset.", "modalities.")
    kept = [text for text in sets if text.startswith(parts) and role_of(text.partition("=")[0]) != "machine"]
    return words + [word for text in kept for word in ("--set", text)]


def show_prepared(result: Prepared, *, preset: str | None, repeat: Sequence[str] = ()) -> None:
    """Print what `prepare` returned and what to run next.

    Args:
        preset: that it was run with.
        repeat: words of its command line that `train` needs too, to mean the same cache.
    """
    columns = ["modality", "clips", "MB", "bytes per view", "shards", "reused", "seconds"]
    squeezed = any(done.int8_error is not None for done in result.modalities.values())
    rows = []
    for name, done in result.modalities.items():
        row = [name, done.clips, f"{done.bytes / 1e6:.1f}", done.bytes_per_view]
        row += [done.shards, done.shards_reused, f"{done.seconds:.1f}"]
        if squeezed:
            row.append("-" if done.int8_error is None else f"{100 * done.int8_error:.2f}%")
        rows.append(row)
    console.table(
        f"{result.dataset}: {result.clips} clips, {result.classes} classes, domains {', '.join(result.domains)}",
        columns + (["int8 error"] if squeezed else []),
        rows,
    )
    bad = len({r.clip for r in result.rejected})
    if result.exit_code:
        console.say(
            f"error: {bad} clips were rejected, and --max-bad allows fewer; the other clips are prepared.\n"
            f"Mend the files in the table above, or run again with --max-bad {bad}."
        )
        return
    named = ["--preset", preset] if preset else []
    held_out = ["--target-domain", result.target] if len(result.domains) > 1 else []
    console.say(f"Next: mbcd train {shlex.join([*named, *repeat, *held_out])}")


_SHOWN = 5


def show_check(report: Checked) -> None:
    """Print what `check` returned."""
    for line in report.layout:
        console.show(line)
    for line in report.warnings:
        console.warn(line)
    console.table(
        f"{report.dataset}: {report.clips} clips, {report.splits['train']} train + "
        f"{report.splits['test']} test, {report.classes} classes",
        ("domain", "train", "test"),
        [(domain, counts["train"], counts["test"]) for domain, counts in report.domains.items()],
    )
    begun = any(modality.shards_there for modality in report.modalities.values())
    rows = []
    for name, modality in report.modalities.items():
        row = [name, modality.complete, modality.incomplete, modality.absent, modality.files_missing]
        row += [
            f"{modality.bytes_per_view['train'] / 1e6:.2f}",
            f"{modality.bytes / 1e9:.2f}",
            console.duration(modality.seconds),
        ]
        rows.append(row + ([f"{modality.shards_there}/{modality.shards}"] if begun else []))
    console.table(
        f"Clips whole, in part or absent, files missing; and what --views {report.views} makes of it",
        ["modality", "whole", "part", "absent", "missing", "MB/view", "GB", "time", *(["shards"] if begun else [])],
        rows,
    )
    for name, modality in report.modalities.items():
        for gap in modality.gaps[:_SHOWN]:
            lacks = f"lacks {gap.missing} of {gap.expected}, first {gap.first}"
            console.say(f"{name}: {gap.clip} {lacks}{': ' if gap.cause else ''}{gap.cause}")
        for bad in modality.unusable:
            console.say(f"{name}: {bad.clip}, which was tried, cannot be used: {bad.file}: {bad.cause}")
        if len(modality.gaps) > _SHOWN:
            console.say(f"{name}: ... and {len(modality.gaps) - _SHOWN} more clips (--json lists all of them)")
        if modality.lacks_weights:
            console.warn(f"{name}: {modality.weights.message}")
    room = "fits" if report.fits else "does not fit"
    console.say(
        f"To write: {report.bytes_to_write / 1e9:.1f} GB, free: {report.free_bytes / 1e9:.1f} GB ({room}). "
        f"About {console.duration(report.seconds)} on {report.device} with {report.workers} decoding workers."
    )
    if untimed := [name for name, modality in report.modalities.items() if not modality.decode_timed_clips]:
        console.say(f"No clip of {', '.join(untimed)} could be timed: a usual decoding time was taken.")
    if report.clips_to_be_rejected:
        console.warn(f"{report.clips_to_be_rejected} clips lack files, or cannot be used, and would be rejected")
    lacking = [name for name, modality in report.modalities.items() if modality.lacks_weights]
    if lacking:
        console.say(f"error: `prepare` would stop, since it lacks the weights of {', '.join(lacking)}.")
    if not report.fits:
        console.say(
            "error: `prepare` would stop, since the cache does not fit. Free some space, name another disk with "
            "--cache-dir, or store fewer views (--views 1)."
        )
    if report.exit_code == 3:
        console.say(
            "error: `prepare` would end with exit code 3. Mend the files above, or allow that many clips with "
            f"--max-bad {report.clips_to_be_rejected}."
        )
