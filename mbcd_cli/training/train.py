"""`mbcd train`: train on the source domains of a prepared dataset, into a run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from mbcd_cli.data.loading import keep_on_device
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import RunError
from mbcd_cli.json_values import OPTIONAL, json_values
from mbcd_cli.processes import ALONE, Group, joined
from mbcd_cli.runs.folder import RunFolder, open_run
from mbcd_cli.runs.names import run_name
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.runtime import configure, peak_memory_mb
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import ClipSet, clip_sets
from mbcd_cli.scoring.deployed import deployed_checkpoint, deployed_of
from mbcd_cli.settings import Settings
from mbcd_cli.training.assemble import Training, assemble
from mbcd_cli.training.feed import Feed
from mbcd_cli.training.resume import Progress
from mbcd_cli.training.trainer import Trainer
from mbcd_cli.training.validation import EpochRecord, HeldOutRecord


@dataclass(frozen=True, slots=True)
class EpochAccuracy:
    """Accuracies (0 to 1) of the deployed model after an epoch, of the fused head and of each modality's own."""

    epoch: int
    validation: float
    validation_unimodal: dict[str, float]
    target: float | None = field(default=None, metadata=OPTIONAL)
    target_unimodal: dict[str, float] | None = field(default=None, metadata=OPTIONAL)
    note: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSummary:
    """What `train` returns and the run's `done` holds; `oracle` and `processes` only where there are such."""

    run: str
    method: str
    target_domain: str | None
    source_domains: list[str]
    seed: int
    deployed: str
    tested: str
    epochs: int
    steps: int
    best: EpochAccuracy
    last: EpochAccuracy
    oracle: EpochAccuracy | None = field(default=None, metadata=OPTIONAL)
    warnings: list[str]
    seconds: float
    steps_per_second: float
    peak_memory_mb: float
    processes: int | None = field(default=None, metadata=OPTIONAL)
    plots: list[str] = field(default_factory=list)


def train_prepared(
    settings: Settings, *, run: Path | None, runs_dir: Path, resume: bool, overwrite: bool, say: Say = SILENT
) -> TrainingSummary | None:
    """`train` on the prepared dataset that `settings` name.

    Args:
        run: the run folder; None: one in `runs_dir`, named after dataset, method, modalities, target and seed.
        resume, overwrite, say: as `train`.

    Raises:
        MbcdError: nothing prepared that matches; what `train` raises.
    """
    settings, dataset = open_for_training(settings)
    folder = run or runs_dir / dataset.name / run_name(settings)
    return train(settings, dataset, run=folder, resume=resume, overwrite=overwrite, say=say)


def train(
    settings: Settings, dataset: Dataset, *, run: Path, resume: bool, overwrite: bool, say: Say = SILENT
) -> TrainingSummary | None:
    """Train into the run folder.

    Args:
        settings: with modalities and source domains resolved against the dataset (`opening.open_for_training`).
        dataset: prepared, matching `settings` (`open_dataset`).
        run: the run folder.
        resume: go on with the run that is there; a finished one is left as it is.
        overwrite: replace the run that is there.
        say: told how it goes, in the main process.

    Started by torchrun, all processes train together (`processes`); rank 0 alone writes and prints.

    Returns:
        What `done` holds: run, epochs, accuracies of best and last, seconds, steps per second, peak memory;
        None in processes other than rank 0.

    Raises:
        SettingsError, CacheError: domains, splits or sizes that the dataset does not have.
        RunError: the folder is in the way, or training had to stop (a signal, a non-finite loss, a full disk).
    """
    clips = ClipsOfTraining.of(settings, dataset)
    training = settings.training
    device = configure(settings.runtime)
    with (
        joined(device, say=say) as group,
        _run_folder(run, settings, resume=resume, overwrite=overwrite, group=group) as folder,
    ):
        if not group.main:
            say = SILENT
        if folder.resumed and (done := summary_of(folder)) is not None:
            say(f"{run} is complete; nothing to resume.")
            return done if group.main else None
        parts = assemble(settings, dataset, device=device, group=group, say=say)
        feed = _feed(settings, dataset, clips, device=device, group=group)
        trainer = trainer_of(parts, settings, dataset, clips, folder=folder, feed=feed, group=group, say=say)
        started, first = time.monotonic(), trainer.progress.step
        try:
            progress = trainer.fit()
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"{device} is out of memory at batches of {training.batch_size} clips.",
                "Lower training.batch_size.",
            ) from error
        memory = max(group.gathered(peak_memory_mb(device)))
        summary = summarise(
            progress, settings=settings, run=run, first=first, seconds=time.monotonic() - started, memory=memory
        )

        def finish() -> TrainingSummary:
            from mbcd_cli.training.curves import plot_run  # imports matplotlib: not before the first step

            method = parts.step.method
            plots = plot_run(run, method.panels(settings.method), method.terms)
            whole = replace(
                summary,
                processes=group.world if group.world > 1 else None,
                plots=[str(path.relative_to(run)) for path in plots],
            )
            folder.finish(json_values(whole))
            return whole

        return group.on_main(finish)


@dataclass(frozen=True, slots=True)
class ClipsOfTraining:
    """What a training reads: its training clips [N], indices into the clip table, and sets that are held out."""

    training: np.ndarray
    held_out: list[ClipSet]

    @classmethod
    def of(cls, settings: Settings, dataset: Dataset) -> ClipsOfTraining:
        """Those of the source and target domains.

        Raises:
            SettingsError, CacheError: domains or splits that the dataset does not have.
        """
        training = settings.training
        held_out = clip_sets(settings, dataset)
        return cls(
            dataset.select(domains=training.source_domains, splits=("train",), limit=training.limit_clips), held_out
        )


def trainer_of(
    parts: Training,
    settings: Settings,
    dataset: Dataset,
    clips: ClipsOfTraining,
    *,
    folder: RunFolder,
    feed: Feed,
    group: Group = ALONE,
    say: Say = SILENT,
) -> Trainer:
    """The trainer of an assembled training, after a warning of what is known to go wrong."""
    trainer = Trainer(
        settings=settings,
        dataset=dataset,
        step=parts.step,
        randomness=parts.randomness,
        clips=clips.training,
        held_out=clips.held_out,
        run=folder,
        device=parts.step.context.step.device,
        feed=feed,
        run_step=parts.run_step,
        group=group,
        say=say,
    )
    _warn_of_unseen_classes(dataset, clips.training, clips.held_out, say)
    _warn_of_long_memory(settings, trainer.total_steps, say)
    return trainer


def summary_of(folder: RunFolder) -> TrainingSummary | None:
    """What `done` holds; None while the run is not complete, and where that is no summary of ours."""
    try:
        return TypeAdapter(TrainingSummary).validate_json(json.dumps(folder.summary), strict=True)
    except ValidationError:
        return None


def _warn_of_long_memory(settings: Settings, steps: int, say: Say) -> None:
    """Warn of a weight average that still is, at the end, in good part what it began with: the initial weights."""
    average = settings.average
    left = average.beta**steps if average.kind == "ema" and not average.start else 0.0
    if left > 0.1:
        lower = f", or use --set average.beta={1 - 5 / steps:.4g}" if steps > 10 else ""
        say.warn(
            f"After {steps} steps the weight average still holds {100 * left:.0f} % of the initial weights "
            f"(average.beta = {average.beta:g}): train longer{lower}."
        )


def _warn_of_unseen_classes(dataset: Dataset, clips: np.ndarray, held_out: Sequence[ClipSet], say: Say) -> None:
    """Warn of classes that are tested and that no training clip has."""
    labels = dataset.clips.labels
    for tested in (clip_set for clip_set in held_out if not clip_set.sealed):
        if unseen := np.setdiff1d(labels[tested.clips], labels[clips]).tolist():
            names, domains = ", ".join(dataset.label_names[label] for label in unseen), ", ".join(tested.domains)
            say.warn(f"No training clip is of class {names}, which {tested.name} clips ({domains}) are of.")


def _run_folder(run: Path, settings: Settings, *, resume: bool, overwrite: bool, group: Group) -> RunFolder:
    """Rank 0 holds the folder; the others only look into it."""
    folder = group.on_main(lambda: open_run(run, settings=settings, resume=resume, overwrite=overwrite))
    return folder or RunFolder(run, lock=None, resumed=resume)


def _feed(
    settings: Settings,
    dataset: Dataset,
    clips: ClipsOfTraining,
    *,
    device: torch.device,
    group: Group = ALONE,
) -> Feed:
    resident = None
    if dataset.caches:
        resident = keep_on_device(
            dataset,
            where=settings.runtime.cache_device,
            training=clips.training,
            testing=[tested.clips for tested in clips.held_out],
            device=device,
        )
    read = None if resident is None else resident.read
    return Feed(dataset, device=device, ahead=settings.runtime.prefetch, read=read, group=group)


def summarise(
    progress: Progress, *, settings: Settings, run: Path, first: int, seconds: float, memory: float
) -> TrainingSummary:
    """Accuracies of the best and the last epoch, and (labelled) of the epoch that happened to suit the target.

    Args:
        first: step that it began or went on at. seconds: that it took since. memory: the most it took, in MB.
    """
    history, training = progress.history, settings.training
    oracle = None
    if history[-1].target is not None:
        suited = max(history, key=lambda record: record.target.deployed.fused.accuracy)
        oracle = replace(_accuracy_of(suited), note="chosen on the target domain; never a result")
    return TrainingSummary(
        run=str(run),
        method=settings.method.name,
        target_domain=training.target_domain,
        source_domains=list(training.source_domains),
        seed=training.seed,
        deployed=deployed_of(history[-1].validation.models),
        tested=deployed_checkpoint(settings.evaluation.checkpoints),
        epochs=len(history),
        steps=progress.step,
        best=_accuracy_of(progress.best),
        last=_accuracy_of(history[-1]),
        oracle=oracle,
        warnings=list(progress.warnings.values()),
        seconds=round(seconds, 3),
        steps_per_second=round((progress.step - first) / max(seconds, 1e-9), 3),
        peak_memory_mb=memory,
    )


def _accuracy_of(record: EpochRecord) -> EpochAccuracy:
    def unimodal(figures: HeldOutRecord) -> dict[str, float]:
        return {name: head.accuracy for name, head in figures.deployed.unimodal.items()}

    validation, target = record.validation, record.target
    return EpochAccuracy(
        epoch=record.epoch,
        validation=validation.deployed.fused.accuracy,
        validation_unimodal=unimodal(validation),
        target=None if target is None else target.deployed.fused.accuracy,
        target_unimodal=None if target is None else unimodal(target),
    )
