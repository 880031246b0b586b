"""The run folder: created once, locked while trained in, its logs cut back to the checkpoint on resume.

settings.toml, metrics.jsonl (one record per epoch), steps.jsonl, timing.jsonl, events/ (TensorBoard),
checkpoints/{last,best}.pt, snapshots/ (with `average.snapshots`), plots/, done; where the target is sealed,
sealed.jsonl: the classes that are said of it, by epoch, model and head.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from mbcd_cli import checksums
from mbcd_cli.errors import BusyError, RunError, SettingsError
from mbcd_cli.files import (
    append_record,
    clear,
    is_partial,
    read_json,
    read_records,
    remove,
    remove_partial,
    sync,
    write_json,
    write_text,
)
from mbcd_cli.ledger import revealed
from mbcd_cli.locks import HOLDER, lock
from mbcd_cli.resolved import changed, load_settings
from mbcd_cli.runs.snapshot_files import SNAPSHOTS
from mbcd_cli.settings import Settings
from mbcd_cli.settings.sources import to_toml

SETTINGS = checksums.TRAINED_WITH
DONE = "done"
AVERAGED = "average.json"
"""What `mbcd average` says of the run that it has made."""
_TIMES = "timing.jsonl"
SEALED = "sealed.jsonl"
LOGS = ("metrics.jsonl", "steps.jsonl", _TIMES, SEALED)
_LOCK = ".lock"
_LOCKS = (_LOCK, _LOCK + HOLDER)


class RunFolder:
    """A run folder that this process holds.

    Attributes:
        path: the folder.
        resumed: whether it held a run that is to go on.
        writes: false in the processes that only follow rank 0; they read checkpoints and write nothing.
    """

    def __init__(self, path: Path, *, lock: FileIO | None, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self.writes = lock is not None
        self._lock = lock

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.checkpoints / "last.pt"

    @property
    def best(self) -> Path:
        """The selected epoch's weights."""
        return self.checkpoints / "best.pt"

    def append(self, log: str, record: Mapping[str, object]) -> None:
        """Add one JSON line to `log`."""
        if self.writes:
            append_record(self.path / log, record, place="--run", then="go on with --resume")

    def sync(self) -> dict[str, int]:
        """Bring the logs to the disk; their sizes for `cut`: bytes, of times (which differ from run to run) records."""
        sizes = dict.fromkeys(LOGS, 0)  # as of those that a resume has cut to nothing
        for name in LOGS:
            path = self.path / name
            if path.exists():
                sync(path, place="--run", then="go on with --resume")
                sizes[name] = path.read_bytes().count(b"\n") if name == _TIMES else path.stat().st_size
        return sizes

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Cut the logs back to `sizes`: what was written after the checkpoint is going to be written again."""
        if not self.writes:
            return
        for name in LOGS:
            path = self.path / name
            if path.exists():
                size = sizes.get(name, 0)
                if name == _TIMES:
                    size = sum(map(len, path.read_bytes().splitlines(keepends=True)[:size]))
                os.truncate(path, min(size, path.stat().st_size))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `done`, the mark of a complete run: `summary`, and the checksums of all that the run has written.

        Others may write here, too: who evaluates an epoch, or looks at its landscape, need not wait for the last one.
        """
        own = (SETTINGS, *LOGS, "warnings.jsonl", "events", "checkpoints", SNAPSHOTS, *summary.get("plots", ()))
        whole = {**summary, "files": checksums.of_files(self.path, *own)}
        write_json(self.path / DONE, whole, place="--run", then="go on with --resume")

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is not complete."""
        try:
            return {key: value for key, value in read_json(self.path / DONE).items() if key != "files"}
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def epoch_records(run: Path) -> list[dict[str, Any]]:
    """A run's records of metrics.jsonl; with the target's accuracies, where it was sealed and is revealed.

    Raises:
        FileError: they cannot be read.
    """
    records = read_records(run / "metrics.jsonl")
    if (look := revealed(run)) is not None:
        told = {each["epoch"]: each.get("target") for each in look["epochs"]}
        records = [{**record, "target": told.get(record.get("epoch"))} for record in records]
    return records


def open_run(path: Path, *, settings: Settings, resume: bool, overwrite: bool) -> RunFolder:
    """Create the run folder, or take over the one that is there.

    Args:
        path: the folder.
        settings: the resolved tree; saved in a new folder, compared with the saved one on resume.
        resume: go on with the run that is there.
        overwrite: delete the run that is there first; only a folder with settings.toml is ever deleted, without
            being asked only where it has neither a checkpoint nor an epoch.

    Raises:
        RunError: the folder is in the way, not a run, or its run has other settings (they are named).
        BusyError: another process trains in it.
        FileError: it cannot be written to.
    """
    path = Path(path)
    exists = path.is_dir() and not all(entry.name in _LOCKS or is_partial(entry) for entry in path.iterdir())
    is_run = (path / SETTINGS).is_file()
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file.", "Name another run folder with --run.")
    if resume and not is_run:
        raise RunError(f"There is no run to resume in {path}.", "Start it without --resume, or check --run.")
    if (path / AVERAGED).is_file():
        raise RunError(f"{path} holds an average of what was trained elsewhere.", "Name another run folder with --run.")
    if exists and not is_run:
        raise RunError(f"{path} exists and is no run folder (no {SETTINGS}).", "Name another one with --run.")
    if _begun(path) and not (resume or overwrite):
        raise RunError(f"{path} already holds a run.", "Go on with --resume, or replace it with --overwrite.")
    held = lock(path / _LOCK, place="--run")
    if held is None:
        raise BusyError(f"Another process is training in {path}.", "Wait for it, or name another --run.")
    try:
        if resume:
            _compare(path, settings)
            for part in ("", "checkpoints", SNAPSHOTS, "plots"):
                remove_partial(path / part)
        else:
            # The old settings.toml stays until it is replaced: a half-deleted run can still be overwritten. First goes
            # what would tell of files that are not there any more, and what it would be gone on with by.
            remove(*(path / name for name in (*checksums.TELLERS, "checkpoints/last.pt")))
            clear(path, but=(*_LOCKS, SETTINGS))
            write_text(path / SETTINGS, to_toml(settings, stamped=True), place="--run")
    except BaseException:
        held.close()
        raise
    return RunFolder(path, lock=held, resumed=resume)


def _begun(path: Path) -> bool:
    """Whether a run folder holds what a new run would lose; one that was refused, or killed, at its start does not."""
    return any((path / name).exists() for name in (DONE, LOGS[0])) or any(path.glob("checkpoints/*.pt"))


def _compare(path: Path, settings: Settings) -> None:
    try:
        saved = load_settings(path / SETTINGS)
    except SettingsError as error:
        raise RunError(f"{path / SETTINGS} cannot be read: {error.message}", "Start anew with --overwrite.") from error
    if differences := changed(saved, settings):
        lines = [f"  {name}: was {before}, now {after}" for name, (before, after) in differences.items()]
        remedy = "Resume with the settings of the run, or start another one with --run."
        if differences.keys() <= {"training.epochs", "training.max_steps"}:  # rates, averages, the epoch go by it
            remedy = "A run has one length: train one of this length from its beginning, with --run or --overwrite."
        raise RunError(f"The run in {path} has other settings:\n" + "\n".join(lines), remedy)
