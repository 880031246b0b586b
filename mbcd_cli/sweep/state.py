"""Where a cell stands, told from its run folder and the small files beside it.

`launch.unit` tells of most of them; `X.toml` are the settings that a cell's process reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mbcd_cli.errors import FOREIGN, FileError
from mbcd_cli.files import read_records
from mbcd_cli.launch.unit import State, beside
from mbcd_cli.locks import held
from mbcd_cli.runs.folder import DONE, SETTINGS
from mbcd_cli.scoring.deployed import deployed_of
from mbcd_cli.scoring.history import CLIPS, fused_accuracy


def state(folder: Path) -> State:
    """Where the cell of this run folder stands.

    waiting: nothing there. running: a process holds it. interrupted: begun, not finished. trained: not evaluated.
    done: trained and evaluated. failed: an error ended it.
    """
    if (folder / DONE).is_file() and (folder / "results.json").is_file():
        return "done"
    if held(beside(folder, "lock")):
        return "running"
    if beside(folder, "failed").is_file():
        return "failed"
    if (folder / DONE).is_file():
        return "trained"
    return "interrupted" if (folder / SETTINGS).is_file() else "waiting"


@dataclass(frozen=True, slots=True)
class CellProgress:
    """How far a cell is: epochs done, and the last fused accuracies (0..1) where known."""

    epochs: int
    validation: float | None = None
    target: float | None = None


def progress(folder: Path) -> CellProgress:
    """The last record of the run's metrics.jsonl, of the deployed model."""
    try:
        *_, last = [{}, *read_records(folder / "metrics.jsonl")]
        accuracies = [fused_accuracy(last, clips, deployed_of(last.get(clips) or ())) for clips in CLIPS]
        return CellProgress(int(last.get("epoch", 0)), *accuracies)
    except (FileError, *FOREIGN):  # being written, or nothing of ours
        return CellProgress(0)
