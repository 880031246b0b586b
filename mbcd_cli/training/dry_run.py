"""`mbcd train --dry-run`: what a training would be like."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import Batch
from mbcd_cli.encoders import build_encoder
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.runtime import configure, peak_memory_mb, use_channels_last
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import clip_sets
from mbcd_cli.settings import Settings
from mbcd_cli.training.assemble import Training, assemble
from mbcd_cli.training.static_step import WARM_UP, StaticStep
from mbcd_cli.training.step import TrainStep


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters by part: trained (tails, heads and the method's own) and frozen (trunks)."""

    trained: int
    frozen: int
    tails: dict[str, int]
    trunks: dict[str, int]
    unimodal_heads: int
    fused_head: int
    method: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What `dry_run` returns.

    Attributes:
        held_out_clips: how many, by clip set. shapes: at the cut, of one clip, of every path of a modality's encoder.
        cache_bytes: of the prepared dataset, None where it is not known.
        step_seconds: of one step. estimated_training_seconds: of all, without validation.
        layout_seconds: of a step by `runtime.channels_last`, timed in turns, what auto takes first; empty where it is
            set or nothing convolves.
        peak_memory_mb: of this process so far.
    """

    dataset: str
    source_domains: list[str]
    target_domain: str | None
    training_clips: int
    held_out_clips: dict[str, int]
    classes: int
    device: str
    batch_size: int
    shapes: dict[str, list[list[int]]]
    parameters: ParameterCounts
    cache_bytes: int | None
    step_seconds: float
    layout_seconds: dict[str, float]
    steps: int
    estimated_training_seconds: float
    peak_memory_mb: float


def dry_run_of_prepared(settings: Settings, *, say: Say = SILENT) -> TrainingPlan:
    """`dry_run` on the prepared dataset that `settings` name.

    Raises:
        MbcdError: nothing prepared that matches; what `dry_run` raises.
    """
    settings, dataset = open_for_training(settings)
    return dry_run(settings, dataset, layouts=True, say=say)


def dry_run(settings: Settings, dataset: Dataset, *, layouts: bool = False, say: Say = SILENT) -> TrainingPlan:
    """What a training would be like: shapes, parameters, sizes and the time of a step; nothing is written.

    Args:
        layouts: time a step in both layouts of convolutions. Which is quicker depends on the machine; it is chosen by
            whoever reads this, not in the first steps of each run, so that all runs of a study have the same.

    Raises:
        SettingsError, CacheError: as `train`.
    """
    training = settings.training
    clips = dataset.select(domains=training.source_domains, splits=("train",), limit=training.limit_clips)
    device = configure(settings.runtime)
    training_parts = assemble(settings, dataset, device=device, say=say)
    step = training_parts.step
    size = min(training.batch_size, len(clips))
    batches = [
        batch.to(device)
        for _, batch in zip(
            range(3),
            dataset.batches(
                clips,
                batch_size=size,
                training=True,
                seed=training.seed,
                epoch=0,
                drop_last=True,
                views=step.method.views,
            ),
            strict=False,
        )
    ]
    compared = {use_channels_last(settings.runtime, device): training_parts}
    if layouts and settings.runtime.channels_last == "auto" and any(map(_convolves, step.model.tails.modules())):
        (other,) = {True, False} - compared.keys()
        runtime = settings.runtime.model_copy(update={"channels_last": "on" if other else "off"})
        compared[other] = assemble(settings.model_copy(update={"runtime": runtime}), dataset, device=device)
    each = dict(zip(compared, _step_seconds(list(compared.values()), batches, device), strict=True))
    seconds = next(iter(each.values()))
    steps = len(clips) // training.batch_size * training.epochs
    steps = min(steps, training.max_steps or steps)
    return TrainingPlan(
        dataset=dataset.name,
        source_domains=list(training.source_domains),
        target_domain=training.target_domain,
        training_clips=len(clips),
        held_out_clips={held.name: len(held.clips) for held in clip_sets(settings, dataset)},
        classes=dataset.classes,
        device=str(device),
        batch_size=training.batch_size,
        shapes={name: [list(part.shape[1:]) for part in parts] for name, parts in batches[0].inputs.items()},
        parameters=_parameters(step, settings),
        cache_bytes=dataset.nbytes,
        step_seconds=round(seconds, 4),
        layout_seconds={("off", "on")[k]: round(own, 4) for k, own in each.items()} if len(each) > 1 else {},
        steps=steps,
        estimated_training_seconds=round(seconds * steps, 3),
        peak_memory_mb=peak_memory_mb(device),
    )


def _convolves(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.conv._ConvNd)


def _step_seconds(trainings: Sequence[Training], batches: list[Batch], device: torch.device) -> list[float]:
    """Mean seconds of two steps of each training, in turns, after what warms them up."""
    runs = [training.run_step or training.step for training in trainings]
    for run in runs:
        for _ in range(WARM_UP + 1 if isinstance(run, StaticStep) else 1):
            run(batches[0])
    seconds = [0.0] * len(runs)
    for index in range(2):
        for number, run in enumerate(runs):
            _wait(device)
            started = time.monotonic()
            run(batches[(index + 1) % len(batches)])
            _wait(device)
            seconds[number] += (time.monotonic() - started) / 2
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parameters(step: TrainStep, settings: Settings) -> ParameterCounts:
    model, own = step.model, step.method

    def count(module: torch.nn.Module, *, trained: bool = False) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

    with torch.device("meta"):
        frozen = {
            name: count(build_encoder(name, modality).cut(modality.cut)[0])
            for name, modality in settings.modalities.items()
        }
    tails = {name: count(model.tails[name]) for name in model.modalities}
    return ParameterCounts(
        trained=count(model, trained=True) + count(own, trained=True),
        frozen=sum(frozen.values()),
        tails=tails,
        trunks=frozen,
        unimodal_heads=count(model.heads),
        fused_head=count(model.fused_head),
        method=count(own, trained=True),
    )
