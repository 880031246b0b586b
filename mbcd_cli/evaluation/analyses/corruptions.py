"""Corruptions of the media, severities 1 to 5, as `prepare --corruptions` cached what becomes of them at the cut.

Letters: B clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mbcd_cli.checksums import PREPARED_WITH
from mbcd_cli.data.corruptions import Corruption
from mbcd_cli.data.modality_cache import ModalityCache
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import TEST_VIEW
from mbcd_cli.encoders.staged import Parts
from mbcd_cli.evaluation.analyses.robustness import Disturbance, Disturbed, DisturbedAccuracy
from mbcd_cli.model import MultiModalModel

MEAN = "mean"
"""What stands for all corruptions of a modality."""


@dataclass(frozen=True, slots=True)
class CorruptionMean:
    """Top-1 (0 to 1), the mean over a modality's `kinds` corruptions and the `severities` that all of them have.

    1 - fused is the mean corruption error of ImageNet-C, not divided by another model's.
    """

    kinds: int
    severities: list[float]
    fused: float
    unimodal: float


@dataclass(frozen=True, slots=True)
class Corrupted(Disturbed):
    """A set of clips under corruptions.

    Attributes:
        means: per modality, over all that is prepared.
        lacking: modalities of which none is prepared.
    """

    means: dict[str, CorruptionMean] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)


def corruptions(name: str, dataset: Dataset, model: MultiModalModel) -> list[Disturbance]:
    """Every corruption of a modality that is prepared, in order; none where the dataset is not on disk.

    Raises:
        CacheError: a cache of corrupted views is damaged, or another one than the name of its folder says.
    """
    clean = dataset.caches.get(name)
    if clean is None:
        return []
    kinds = list(dataset.modalities[name].corruptions)
    told = [Corruption.of_folder(index.parent.name) for index in clean.folder.glob("*/index.h5")]
    there = [corruption for corruption in told if corruption is not None and corruption.name in kinds]
    there.sort(key=lambda corruption: (kinds.index(corruption.name), corruption.severity))
    return [_disturbance(name, clean, corruption, model) for corruption in there]


def _disturbance(name: str, clean: ModalityCache, corruption: Corruption, model: MultiModalModel) -> Disturbance:
    cache = clean.corrupted(corruption)

    def apply(parts: Parts, clips: torch.Tensor) -> Parts:
        index = clips.cpu().numpy()
        read = cache.read(index, np.full(len(index), TEST_VIEW))
        return model.through_trunk(name, tuple(part.to(parts[0].device) for part in read))

    return Disturbance(name, corruption.name, corruption.severity, apply)


def how_to_prepare(name: str, dataset: Dataset) -> str:
    """The command that prepares a modality's corruptions."""
    cache = dataset.caches.get(name)
    if cache is None:
        return "mbcd prepare"
    reader = cache.provenance.get("reader", "READER")
    return f"mbcd prepare {reader} --config {cache.folder / PREPARED_WITH} --corruptions all"


def mean_records(records: Sequence[DisturbedAccuracy]) -> list[DisturbedAccuracy]:
    """Per modality and severity the mean over kinds, where every kind of the modality has that severity."""
    means = []
    for modality in dict.fromkeys(r.modality for r in records):
        own = [r for r in records if r.modality == modality]
        kinds = {r.kind for r in own}
        for level in sorted({r.level for r in own}):
            alike = [r for r in own if r.level == level]
            if len(alike) == len(kinds):
                means.append(DisturbedAccuracy(modality, MEAN, level, alike[0].clips, *_mean(alike)))
    return means


def corruption_means(records: Sequence[DisturbedAccuracy]) -> dict[str, CorruptionMean]:
    """Per modality the mean over kinds and those severities that all of them have; none where there is no such."""
    means = {}
    for modality in dict.fromkeys(r.modality for r in records):
        alike = [r for r in mean_records(records) if r.modality == modality]
        kinds = {r.kind for r in records if r.modality == modality}
        if alike:
            means[modality] = CorruptionMean(len(kinds), [r.level for r in alike], *_mean(alike))
    return means


def _mean(records: Sequence[DisturbedAccuracy]) -> tuple[float, float]:
    """Of fused and uni-modal accuracy."""
    return float(np.mean([r.fused for r in records])), float(np.mean([r.unimodal for r in records]))
