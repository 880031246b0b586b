"""`mbcd train`: train on the source domains of a prepared dataset, into a run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from mbcd_cli.data.loading import keep_on_device
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import FOREIGN, CheckpointError, RunError, SettingsError
from mbcd_cli.processes import ALONE, Group, joined
from mbcd_cli.runs.folder import RunFolder, open_run
from mbcd_cli.runtime import configure, peak_memory_mb
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import ClipSet, clip_sets
from mbcd_cli.scoring.deployed import deployed_checkpoint, deployed_of
from mbcd_cli.settings import Settings
from mbcd_cli.training.assemble import Training, assemble
from mbcd_cli.training.feed import Feed
from mbcd_cli.training.resume import Progress
from mbcd_cli.training.trainer import Trainer


class EpochAccuracy(TypedDict):
    """Accuracies (0 to 1) of the deployed model after an epoch, of the fused head and of each modality's own."""

    epoch: int
    validation: float
    validation_unimodal: dict[str, float]
    target: NotRequired[float]
    target_unimodal: NotRequired[dict[str, float]]
    note: NotRequired[str]


class TrainingSummary(TypedDict):
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
    oracle: NotRequired[EpochAccuracy]
    warnings: list[str]
    seconds: float
    steps_per_second: float
    peak_memory_mb: float
    processes: NotRequired[int]
    plots: list[str]


def train(
    settings: Settings, dataset: Dataset, *, run: Path, resume: bool, overwrite: bool, say: Say = SILENT
) -> TrainingSummary:
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
        nothing in processes other than rank 0.

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
        if folder.resumed and (done := _summary_of(folder)) is not None:
            say(f"{run} is complete; nothing to resume.")
            return done if group.main else {}
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
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise SettingsError(
                "training.batch_size: batch norm has no statistics in a batch of one clip.",
                "Raise it, or set training.batch_norm=frozen.",
            ) from error
        summary = summarise(progress, settings=settings, run=run)
        memory = max(group.gathered(peak_memory_mb(device)))
        summary |= speed(progress, first=first, seconds=time.monotonic() - started, memory=memory)
        if group.world > 1:
            summary["processes"] = group.world

        def finish() -> TrainingSummary:
            from mbcd_cli.training.curves import plot_run  # imports matplotlib: not before the first step

            method = parts.step.method
            plots = plot_run(run, method.panels(settings.method), method.terms)
            summary["plots"] = [str(path.relative_to(run)) for path in plots]
            folder.finish(summary)
            return summary

        return group.on_main(finish) or {}


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
    _check_history(trainer.progress, settings, folder)
    _warn_of_unseen_classes(dataset, clips.training, clips.held_out, say)
    _warn_of_long_memory(settings, trainer.total_steps, say)
    return trainer


def speed(progress: Progress, *, first: int, seconds: float, memory: float) -> TrainingSummary:
    """Seconds, steps per second since step `first`, and peak memory in MB."""
    return {
        "seconds": round(seconds, 3),
        "steps_per_second": round((progress.step - first) / max(seconds, 1e-9), 3),
        "peak_memory_mb": memory,
    }


def _check_history(progress: Progress, settings: Settings, folder: RunFolder) -> None:
    """Refuse, before any step, figures of earlier epochs that could not be summed up after the last.

    Raises:
        CheckpointError: they are such.
    """
    try:
        if progress.history:
            TypeAdapter(EpochAccuracy).validate_python(summarise(progress, settings=settings, run=folder.path)["last"])
    except (ValidationError, *FOREIGN) as error:
        raise CheckpointError(
            f"{folder.last} does not fit this run: its figures are others ({type(error).__name__}).",
            "Start anew with --overwrite.",
        ) from error


def _summary_of(folder: RunFolder) -> TrainingSummary | None:
    """What `done` holds; None while the run is not complete, and where that is no summary of ours."""
    try:
        return TypeAdapter(TrainingSummary).validate_python(folder.summary, strict=True)
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
    for one in held_out:
        if unseen := np.setdiff1d(labels[one.clips], labels[clips]).tolist():
            names = ", ".join(dataset.label_names[label] for label in unseen)
            say.warn(f"No training clip is of class {names}, which {one.name} clips ({', '.join(one.domains)}) are of.")


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
            testing=[one.clips for one in clips.held_out],
            device=device,
        )
    read = None if resident is None else resident.read
    return Feed(dataset, device=device, ahead=settings.runtime.prefetch, read=read, group=group)


def summarise(progress: Progress, *, settings: Settings, run: Path) -> TrainingSummary:
    """Accuracies of the best and the last epoch, and (labelled) of the epoch that happened to suit the target."""
    history = progress.history
    deployed = deployed_of(history[-1]["validation"])

    def epoch(record: Mapping[str, Any]) -> EpochAccuracy:
        found = {"epoch": record["epoch"]}
        for where in ("validation", "target"):
            if where in record:
                figures = record[where][deployed]
                found[where] = figures["fused"]["accuracy"]
                found[f"{where}_unimodal"] = {k: v["accuracy"] for k, v in figures["unimodal"].items()}
        return found

    best = next(record for record in history if record["epoch"] == progress.best["epoch"])
    summary = {
        "run": str(run),
        "method": settings.method.name,
        "target_domain": settings.training.target_domain,
        "source_domains": list(settings.training.source_domains),
        "seed": settings.training.seed,
        "deployed": deployed,
        "tested": deployed_checkpoint(settings.evaluation.checkpoints),
        "epochs": len(history),
        "steps": progress.step,
        "best": epoch(best),
        "last": epoch(history[-1]),
        "warnings": list(progress.warnings.values()),
    }
    if "target" in history[-1]:
        oracle = max(history, key=lambda record: record["target"][deployed]["fused"]["accuracy"])
        summary["oracle"] = epoch(oracle) | {"note": "chosen on the target domain; never a result"}
    return summary
