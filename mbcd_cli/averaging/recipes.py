"""Which weights an average after the fact is of: a profile, a window of epochs or SWAD's valley of one run.

A recipe weighs what `average.snapshots` kept of every epoch; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mbcd_cli.errors import FOREIGN, RunError, SettingsError
from mbcd_cli.json_values import OPTIONAL
from mbcd_cli.runs.folder import epoch_records
from mbcd_cli.runs.snapshot_files import kept_snapshots
from mbcd_cli.training.profiles import KEPT, Fit, PowerProfile, fitted, gamma_of
from mbcd_cli.training.swad import published_counts, valley

MEAN = "mean of its steps"
_FAR = 0.1
"""L1 distance of profiles from which on it is told."""
_NOTHING = 1e-12
"""Weights so small are what the solution rounds to."""


@dataclass(frozen=True, slots=True)
class KeptEpoch:
    """An epoch with snapshots: steps done after it and in it, and the student's loss on source validation."""

    epoch: int
    step: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class WeighedPart:
    """What counts in an average: `of` an epoch its mean (`MEAN`), or the power function of exponent `gamma`."""

    epoch: int
    of: str
    weight: float
    gamma: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What an average of a run's epochs is made of.

    Attributes:
        parts: what counts and how much, 1 in all.
        fit: of a profile: how well it is met.
        epochs: first and last of a window or valley.
        warnings: what a reader should know.
    """

    parts: list[WeighedPart]
    fit: Fit | None = field(default=None, metadata=OPTIONAL)
    epochs: tuple[int, int] | None = field(default=None, metadata=OPTIONAL)
    warnings: list[str] = field(default_factory=list)


def kept_epochs_of(run: Path) -> list[KeptEpoch]:
    """Those of a run, in their order.

    Raises:
        RunError: it has kept no snapshots, or other epochs than its records are of.
    """
    numbers = kept_snapshots(run)
    try:
        records = {
            int(record["epoch"]): (int(record["step"]), float(record["validation"]["student"]["fused"]["loss"]))
            for record in epoch_records(run)
        }
    except FOREIGN as error:
        raise RunError(
            f"{run / 'metrics.jsonl'} holds what no training writes ({type(error).__name__}: {error}).",
            "`mbcd verify` says what is damaged; train that run again.",
        ) from error
    if list(records) != numbers:
        raise RunError(
            f"{run} has records of {len(records)} epochs, and snapshots of {len(numbers)}.",
            "`mbcd verify` says what is damaged; train that run again.",
        )
    epochs, before = [], 0
    for number, (step, loss) in records.items():
        epochs.append(KeptEpoch(number, step, step - before, loss))
        before = step
    return epochs


def profile(kept: Sequence[KeptEpoch], sigma: float) -> Recipe:
    """The power function of relative width `sigma` at the last step, from the two that were kept after every epoch.

    Raises:
        SettingsError: there is none of that width.
    """
    snapshots = [(width, gamma_of(width), epoch) for width in KEPT for epoch in kept]
    wanted = PowerProfile(kept[-1].step, gamma_of(sigma))
    weights, fit = fitted([PowerProfile(epoch.step, gamma) for _, gamma, epoch in snapshots], wanted)
    warnings = []
    if fit.distance > _FAR:
        warnings.append(
            f"Width {sigma:g} is met to an L1 distance of {fit.distance:.2f} only, from {len(kept)} epochs: widths "
            f"between {min(KEPT)} and {max(KEPT)}, or more epochs, come nearer."
        )
    parts = [
        WeighedPart(epoch.epoch, f"power function of width {width:g}", weight, gamma)
        for (width, gamma, epoch), weight in zip(snapshots, weights, strict=True)
        if abs(weight) > _NOTHING
    ]
    return Recipe(parts=parts, fit=fit, warnings=warnings)


def window(kept: Sequence[KeptEpoch], first: int, last: int) -> Recipe:
    """The mean of the weights after every step of epochs `first` to `last`, both included.

    Raises:
        SettingsError: there are no such epochs.
    """
    if not 1 <= first <= last <= len(kept):
        raise SettingsError(
            f"--window {first}..{last}: the run has epochs 1 to {len(kept)}.",
            "Choose among those, the first first.",
        )
    return Recipe(parts=_means(kept[first - 1 : last]), epochs=(first, last))


def swad(kept: Sequence[KeptEpoch], *, converge: int, leave: int, tolerance: float, published: bool = False) -> Recipe:
    """SWAD's valley of the student's source-validation loss: by the clean rule, or as the authors' code counts.

    Where no valley begins it is the last epoch's mean, as theirs; a warning says so.
    """
    losses, constants = [epoch.loss for epoch in kept], {"converge": converge, "leave": leave, "tolerance": tolerance}
    counts = published_counts(losses, **constants) if published else None
    span = valley(losses, **constants, closed=True)
    warnings = []
    if span is None:
        warnings.append(
            f"No valley begins in {len(kept)} epochs (no epoch has the least loss of {converge} in a row from it on): "
            "this is the last epoch's mean."
        )
        parts = _means(kept[-1:])
    elif counts is not None:
        parts = [WeighedPart(kept[t].epoch, MEAN, count / sum(counts.values())) for t, count in counts.items()]
    else:
        parts = _means(kept[slice(*span)])
    return Recipe(parts=parts, epochs=(parts[0].epoch, parts[-1].epoch), warnings=warnings)


def _means(epochs: Sequence[KeptEpoch]) -> list[WeighedPart]:
    total = sum(epoch.steps for epoch in epochs)
    return [WeighedPart(epoch.epoch, MEAN, epoch.steps / total) for epoch in epochs]
