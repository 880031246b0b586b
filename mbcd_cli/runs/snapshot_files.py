"""Averages of the student that a training keeps beside itself: `snapshots/epoch-NNN.pt`, one file after every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbcd_cli.errors import FOREIGN, CheckpointError, RunError, lines_of
from mbcd_cli.runs.checkpoint import Tensors, by_itself, read_tensors, save_tensors, state_of

SNAPSHOTS = "snapshots"
"""Their folder in a run's."""
_FORMAT = "mbcd-snapshot"
_VERSION = 1
_COUNTS, _STATES = ("epoch", "step", "steps"), ("mean", "counters")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is kept of an epoch.

    Attributes:
        epoch: its number, from 1. step: steps done in all. steps: of this epoch.
        gammas: exponents of the power functions. averages: of each, the averaged weights at `step`, by name.
        mean: of the weights after every step of this epoch.
        counters: what of the student counts, such as the batches that a batch norm has seen.
    """

    epoch: int
    step: int
    steps: int
    gammas: list[float]
    averages: list[Tensors]
    mean: Tensors
    counters: Tensors


def save_snapshot(run: Path, snapshot: Snapshot) -> Path:
    """Write it into a run's folder, whole or not at all; returns its file.

    Raises:
        FileError: it cannot be written.
    """
    path = _file(run, snapshot.epoch)
    payload: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "gammas": snapshot.gammas}
    payload |= {name: getattr(snapshot, name) for name in _COUNTS}
    payload |= {name: _own(getattr(snapshot, name)) for name in _STATES}
    save_tensors(path, payload | {"averages": [_own(average) for average in snapshot.averages]})
    return path


def load_snapshot(run: Path, epoch: int) -> Snapshot:
    """A run's, of epoch `epoch`, on the CPU.

    Raises:
        CheckpointError: missing, damaged, hostile or foreign.
    """
    path = _file(run, epoch)
    then = "Train that run again, with --set average.snapshots=true."
    payload = read_tensors(path, format=_FORMAT, version=_VERSION, what="snapshot", then=then)
    try:
        snapshot = _parsed(payload)
        if snapshot.epoch != epoch:
            raise ValueError(f"it is of epoch {snapshot.epoch}")
    except FOREIGN as error:
        raise CheckpointError(f"{path} is damaged: {lines_of(error)[0]}", then) from error
    return snapshot


def kept_snapshots(run: Path) -> list[int]:
    """The epochs that a finished run has kept averages of, all from the first on.

    Raises:
        RunError: it has none, or lacks one.
    """
    names = (path.stem.removeprefix("epoch-") for path in (run / SNAPSHOTS).glob("epoch-*.pt"))
    epochs = sorted(int(name) for name in names if name.isdecimal())
    if not epochs:
        raise RunError(
            f"{run} has kept no averages of its epochs.", "Train it again with --set average.snapshots=true."
        )
    if epochs != list(range(1, len(epochs) + 1)):
        raise RunError(
            f"{run / SNAPSHOTS} lacks averages of some epochs.", "`mbcd verify` says which; train that run again."
        )
    return epochs


def _file(run: Path, epoch: int) -> Path:
    return run / SNAPSHOTS / f"epoch-{epoch:03d}.pt"


def _own(state: Tensors) -> Tensors:
    return {name: by_itself(value) for name, value in state.items()}


def _parsed(payload: Mapping[str, Any]) -> Snapshot:
    counts = {name: payload[name] for name in _COUNTS}
    gammas, averages = payload["gammas"], payload["averages"]
    if not all(isinstance(count, int) and count > 0 for count in counts.values()):
        raise TypeError("it counts no steps")
    if not all(isinstance(gamma, float) for gamma in gammas) or len(gammas) != len(averages):
        raise TypeError("its exponents are none")
    states = {name: state_of(payload[name], name) for name in _STATES}
    read = [state_of(average, "average") for average in averages]
    if any(average.keys() != states["mean"].keys() for average in read):
        raise ValueError("its averages are of other weights")
    return Snapshot(**counts, gammas=list(gammas), averages=read, **states)
