"""`mbcd train --dry-run`: what a training would be like."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import Batch
from mbcd_cli.encoders import build_encoder
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.runtime import configure, peak_memory_mb
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import clip_sets
from mbcd_cli.settings import Settings
from mbcd_cli.training.assemble import assemble
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
    steps: int
    estimated_training_seconds: float
    peak_memory_mb: float


def dry_run_of_prepared(settings: Settings, *, say: Say = SILENT) -> TrainingPlan:
    """`dry_run` on the prepared dataset that `settings` name.

    Raises:
        MbcdError: nothing prepared that matches; what `dry_run` raises.
    """
    settings, dataset = open_for_training(settings)
    return dry_run(settings, dataset, say=say)


def dry_run(settings: Settings, dataset: Dataset, *, say: Say = SILENT) -> TrainingPlan:
    """What a training would be like: shapes, parameters, sizes and the time of a step; nothing is written.

    Raises:
        SettingsError, CacheError: as `train`.
    """
    training = settings.training
    clips = dataset.select(domains=training.source_domains, splits=("train",), limit=training.limit_clips)
    device = configure(settings.runtime)
    step = assemble(settings, dataset, device=device, say=say).step
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
    seconds = _step_seconds(step, batches, device)
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
        steps=steps,
        estimated_training_seconds=round(seconds * steps, 3),
        peak_memory_mb=peak_memory_mb(device),
    )


def _step_seconds(step: TrainStep, batches: list[Batch], device: torch.device) -> float:
    """Mean seconds of two steps, after one that warms up."""
    step(batches[0])
    _wait(device)
    started = time.monotonic()
    for index in range(2):
        step(batches[(index + 1) % len(batches)])
    _wait(device)
    return (time.monotonic() - started) / 2


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
