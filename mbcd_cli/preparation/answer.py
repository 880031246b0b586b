"""What `prepare` returns; and the same again, while nothing has changed: no table is read, and no file is opened.

A million clips are listed and fingerprinted in a minute; that their table, media, weights and shards are as they were
is seen in seconds. An answer is kept where tables alone say what clips there are, and all of them could be used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mbcd_cli import __version__
from mbcd_cli.audit.findings import Leak
from mbcd_cli.checksums import ANSWER
from mbcd_cli.data.cache import FORMAT
from mbcd_cli.data.modalities import KINDS
from mbcd_cli.data.modalities.modality import each_file
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.records import Mended, Rejected
from mbcd_cli.errors import FOREIGN
from mbcd_cli.files import delete, read_json, write_json
from mbcd_cli.json_values import json_values
from mbcd_cli.preparation.trunk import needs_weights, weight_files
from mbcd_cli.settings import Settings

_RECENT = 10**8
"""Nanoseconds by which a file must be older than the work: the clock of a file system is coarse."""


@dataclass(frozen=True, slots=True)
class PreparedModality:
    """What `prepare` says of one modality.

    Attributes:
        clips: that can be used.
        bytes: of the shards, without the index; bytes_per_view: of a training view.
        int8_error: root of the mean squared error relative to the values; None where nothing is int8.
        float16_loss: what float16 took from the values, in words; empty where that is next to nothing.
        seconds: of this run.
        corrupted, corrupted_bytes: caches of corrupted test views that were asked for, and their bytes.
    """

    folder: str
    fingerprint: str
    clips: int
    bytes: int
    bytes_per_view: int
    int8_error: float | None
    float16_loss: str
    mended: list[Mended]
    shards: int
    shards_reused: int
    seconds: float
    corrupted: int
    corrupted_bytes: int

    @property
    def loss(self) -> str:
        """`float16_loss`, and what to do about it."""
        return self.float16_loss and f"{self.float16_loss}. --set cache.dtype=float32 keeps them as they are."


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` returns.

    Attributes:
        clips: those that can be used and those that cannot.
        target: a domain to begin with: one that cannot be a source, where there is one.
        left_out: training clips that are not among them, since they tell of test clips.
        exit_code: 3 where more clips were rejected than `dataset.max_bad`.
    """

    dataset: str
    cache: str
    clips: int
    domains: list[str]
    target: str
    classes: int
    modalities: dict[str, PreparedModality]
    rejected: list[Rejected]
    left_out: list[Leak]
    exit_code: int


def kept_answer(settings: Settings) -> tuple[Prepared, list[str]] | None:
    """What an earlier `prepare` with the same settings returned, and its warnings; None where something has changed."""
    for path in settings.cache.dir.glob(f"*/{ANSWER}{_key(settings)}.json"):
        with suppress(OSError, *FOREIGN):
            kept = read_json(path)
            if kept["seen"] == _digest(each_file(_look, kept["files"].split("\n"))):
                return _prepared(**kept["prepared"]), kept["warnings"]
    return None


def keep_answer(settings: Settings, listing: Listing, prepared: Prepared, *, started: int) -> None:
    """Keep what `prepare` returned beside the caches, unless something may have changed since it began.

    Args:
        started: when the work began, in nanoseconds since 1970.

    Raises:
        FileError: full disk or missing rights.
    """
    folder = settings.cache.dir / prepared.dataset
    for path in folder.glob(f"{ANSWER}*"):
        delete(path)
    mended = any(done.mended for done in prepared.modalities.values())
    # Of a model with random weights only its folder says what it is like.
    unseen = settings.cache.random_weights and any(one.from_files for one in listing.modalities.values())
    if prepared.rejected or mended or unseen or not listing.tables:
        return
    frozen = [modality for modality in listing.modalities.values() if needs_weights(settings, modality)]
    weights = [file for one in frozen for file in weight_files(settings, one)]
    sources = [*listing.tables, *weights]
    for column in (*listing.clips.media.values(), *listing.gone.media.values()):
        sources += map(column.path, dict.fromkeys(file for files, _ in column.described() for file in files))
    seen = each_file(_look, sources)
    if any(one is None or one[1] > started - _RECENT for one in seen) or any("\n" in str(file) for file in sources):
        return
    # What says what weights are may also come later: its place is watched.
    beside = [file.with_name(f"{file.name}.{what}") for file in weights for what in ("toml", "passport.json")]
    beside += [folder / "passport.json" for folder in dict.fromkeys(file.parent for file in weights)]
    stored = [file for done in prepared.modalities.values() for file in sorted(Path(done.folder).glob("[!.]*"))]
    answer = {
        "prepared": json_values(prepared),
        "warnings": listing.warnings + [f"{name}: {one.loss}" for name, one in prepared.modalities.items() if one.loss],
        "files": "\n".join(map(str, [*sources, *beside, *stored])),
        "seen": _digest([*seen, *each_file(_look, [*beside, *stored])]),
    }
    write_json(folder / f"{ANSWER}{_key(settings)}.json", answer, place="--cache-dir")


def _key(settings: Settings) -> str:
    asked = settings.model_dump(
        mode="json", include={"dataset": True, "cache": True, "modalities": True, "model": {"modalities"}}
    )
    told = [__version__, FORMAT, [kind.decoder() for kind in KINDS.values()], str(Path.cwd()), asked]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def _look(file: str | Path) -> tuple[int, int] | None:
    """Bytes and time of change of a file or folder (which tells what it holds); None where it is not there."""
    with suppress(OSError):
        status = Path(file).stat()
        return status.st_size, status.st_mtime_ns
    return None


def _digest(seen: Sequence[tuple[int, int] | None]) -> str:
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _prepared(*, modalities: dict[str, dict], left_out: list[dict], **others) -> Prepared:
    reused = {
        name: replace(PreparedModality(**done), shards_reused=done["shards"], seconds=0.0)
        for name, done in modalities.items()
    }
    return Prepared(**others, modalities=reused, left_out=[Leak(**leak) for leak in left_out])
