"""Where a training stands, and how it goes on from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from mbcd_cli.errors import FOREIGN, CheckpointError, lines_of
from mbcd_cli.randomness import Randomness
from mbcd_cli.runs.checkpoint import by_itself, load_checkpoint
from mbcd_cli.runs.folder import RunFolder
from mbcd_cli.training.figures import Layout
from mbcd_cli.training.optimizer import load_optimizer, optimizer_state
from mbcd_cli.training.step import TrainStep
from mbcd_cli.training.validation import EpochRecord

_HISTORY = TypeAdapter(list[EpochRecord])


@dataclass(slots=True)
class Progress:
    """Where a training stands; all of it goes into checkpoints.

    Attributes:
        epoch: epochs finished. epoch_step: steps done in the one after. step: steps in all.
        pending: figures of the steps since the last record of steps.jsonl, as (clips [B], vector) pairs.
        sums: sums over the epoch's steps of their vectors times their clips, float64, and `clips` how many.
        history: records of metrics.jsonl. best: the selected one of them. warnings: key -> text.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    pending: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    sums: torch.Tensor | None = None
    clips: int = 0
    history: list[EpochRecord] = field(default_factory=list)
    best: EpochRecord | None = None
    warnings: dict[str, str] = field(default_factory=dict)


def training_state(
    progress: Progress, step: TrainStep, randomness: Randomness, run: RunFolder, *, code: str
) -> dict[str, Any]:
    """What a checkpoint holds beside the models: own modules, average, optimizer, random states, figures, logs; `code`,
    the digest of a method's own file."""
    return {
        "code": code,
        "optimizer": optimizer_state(step.optimizer),
        "method": {name: by_itself(value) for name, value in step.method.state_dict().items()},
        "average": {} if step.average is None else step.average.state(),
        "snapshots": None if step.snapshots is None else step.snapshots.state(),
        "randomness": randomness.state(),
        "global": randomness.globals(),
        "pending": [[clips, vector] for clips, vector in progress.pending],
        "sums": progress.sums,
        "layout": None if step.layout is None else [list(step.layout.scalars), list(step.layout.rows)],
        "clips": progress.clips,
        "logs": run.sync(),
        "warning_keys": dict(progress.warnings),
    }


def resume(
    progress: Progress,
    step: TrainStep,
    randomness: Randomness,
    run: RunFolder,
    fingerprints: Mapping[str, str],
    *,
    code: str,
    steps_per_epoch: int,
) -> bool:
    """Bring everything to where `last.pt` left it; False when the run was killed before its first checkpoint.

    Raises:
        CheckpointError: it holds weights only, belongs to another cache or other code, or does not fit the model.
    """
    if not run.last.exists():
        run.cut({})
        return False
    saved = load_checkpoint(run.last)
    if saved.training is None:
        raise CheckpointError(f"{run.last} holds weights only.", "Start anew with --overwrite.")
    if saved.fingerprints != fingerprints:
        changed = [n for n, f in fingerprints.items() if saved.fingerprints.get(n) != f]
        raise CheckpointError(
            f"The cache of {', '.join(changed) or 'some modality'} changed since this run began.",
            "Prepare with the settings of the run again, or start another run.",
        )
    state = saved.training
    if state.get("code", "") != code:
        raise CheckpointError(
            f"{saved.settings.method.name.rpartition(':')[0]} was edited since this run began: {run.last} is of other "
            "code.",
            "Set the file back, or train anew with another --run.",
        )
    if step.snapshots is not None and not state.get("snapshots"):
        raise CheckpointError(
            f"{run.last} was trained without average.snapshots, which begin with the first step.",
            "Resume without them, or start anew with --overwrite.",
        )
    try:
        step.model.load_state_dict(saved.student)
        if step.average is not None:
            step.average.model.load_state_dict(saved.teacher or {})
            step.average.load(state["average"])
        if step.snapshots is not None:
            step.snapshots.load(state["snapshots"])
        step.method.load_state_dict(state["method"])
        load_optimizer(step.optimizer, state["optimizer"])
        progress.epoch, progress.epoch_step, progress.step = saved.epoch, saved.epoch_step, saved.step
        progress.pending = [(clips, vector) for clips, vector in state["pending"]]
        progress.sums, progress.clips = state["sums"], state["clips"]
        if state["layout"] is not None:
            scalars, rows = state["layout"]
            step.layout = Layout(tuple(scalars), tuple(rows), step.model.modalities)
        progress.history = _records(saved.history)
        progress.best = progress.history[saved.best["epoch"] - 1] if saved.best is not None else None
        progress.warnings = {str(key): str(text) for key, text in state["warning_keys"].items()}
        _check(progress, step.layout, steps_per_epoch)
        run.cut(state["logs"])
        randomness.load(state["randomness"])
        randomness.load_globals(state["global"])
    except (RuntimeError, *FOREIGN) as error:
        why = lines_of(error)[0]
        raise CheckpointError(f"{run.last} does not fit this run: {why}", "Start anew with --overwrite.") from error
    return True


def _records(history: list[dict[str, Any]]) -> list[EpochRecord]:
    """Those of a checkpoint.

    Raises:
        ValueError: they are other figures than a training's.
    """
    try:
        return _HISTORY.validate_json(json.dumps(history), strict=True)
    except ValidationError as error:
        raise ValueError("the figures of its epochs are others") from error


def _check(progress: Progress, layout: Layout | None, steps_per_epoch: int) -> None:
    """Refuse counts and figures that no training has left together.

    Raises:
        ValueError: they are such.
    """
    epochs = [record.epoch for record in progress.history]
    measured = progress.best is not None and progress.best.validation.deployed.fused.loss is not None
    if epochs != [*range(1, len(epochs) + 1)] or len(epochs) != progress.epoch or measured != bool(epochs):
        raise ValueError("its epochs, their figures and the best of them do not belong together")
    most = progress.epoch * steps_per_epoch + progress.epoch_step  # `training.max_steps` may cut an epoch short
    fitting = 0 <= progress.epoch_step <= min(progress.step, steps_per_epoch) and progress.step <= most
    if not fitting or not isinstance(progress.clips, int):
        raise ValueError("its counts of steps and clips do not belong together")
    vectors = [vector for _, vector in progress.pending] + ([] if progress.sums is None else [progress.sums])
    size = 0 if layout is None else len(layout.scalars) + len(layout.rows) * len(layout.modalities)
    if any(vector.shape != (size,) for vector in vectors) or any(clips.dim() != 1 for clips, _ in progress.pending):
        raise ValueError("the figures of its last steps are not those of this method")
