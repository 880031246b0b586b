"""Averaged weights: sums over snapshots and over models, batch-norm statistics, and what source validation says.

Of a target nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from mbcd_cli.averaging.recipes import WeighedPart
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import Batch
from mbcd_cli.errors import CheckpointError, MbcdError, SettingsError
from mbcd_cli.model import MultiModalModel
from mbcd_cli.runs.checkpoint import Checkpoint, Tensors
from mbcd_cli.runs.snapshot_files import Snapshot, load_snapshot
from mbcd_cli.runs.trunks import attach_trunks
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import SOURCE, clip_sets, source_domains
from mbcd_cli.scoring.deployed import build_models
from mbcd_cli.scoring.predictions import autocast, evaluating, predict
from mbcd_cli.settings import Settings
from mbcd_cli.training.validation import HeadRecord, model_record


def of_snapshots(run: Path, parts: Sequence[WeighedPart], base: Tensors) -> Tensors:
    """A run's weighted snapshots, summed in float64, one in memory at a time.

    Args:
        base: the student's state dict: frozen weights, which no snapshot holds, and types.

    Raises:
        CheckpointError: a snapshot that is damaged, or of another model.
    """
    total: dict[str, torch.Tensor] = {}
    counters: Tensors = {}
    for epoch in sorted({part.epoch for part in parts}):
        snapshot = load_snapshot(run, epoch)
        for part in (part for part in parts if part.epoch == epoch):
            _add(total, _state(run, snapshot, part), part.weight)
        counters = snapshot.counters
    if not {**total, **counters}.keys() <= base.keys() or any(total[n].shape != base[n].shape for n in total):
        raise CheckpointError(
            f"The snapshots of {run} are of another model than its checkpoints.", "Train that run again."
        )
    return {**base, **{name: value.to(base[name].dtype) for name, value in total.items()}, **counters}


def _state(run: Path, snapshot: Snapshot, part: WeighedPart) -> Tensors:
    if part.gamma is None:
        return snapshot.mean
    for gamma, average in zip(snapshot.gammas, snapshot.averages, strict=True):
        if gamma == part.gamma:
            return average
    raise CheckpointError(f"The snapshots of {run} are of other power functions.", "Train that run again.")


def of_states(states: Sequence[Tensors]) -> Tensors:
    """The mean of several models' state dicts, summed in float64; what counts is the first one's."""
    total: dict[str, torch.Tensor] = {}
    for state in states:
        _add(total, {name: value for name, value in state.items() if value.is_floating_point()}, 1 / len(states))
    return {name: total[name].to(value.dtype) if name in total else value for name, value in states[0].items()}


def _add(total: dict[str, torch.Tensor], state: Mapping[str, torch.Tensor], weight: float) -> None:
    for name, value in state.items():
        total[name] = total.get(name, 0) + weight * value.double()


@dataclass(frozen=True, slots=True)
class Statistics:
    """Where batch norms' statistics come from: averaged, recomputed (on so many source training clips) or none."""

    source: str
    norms: int
    clips: int = 0


class Bank:
    """Makes models of averaged weights of one run's kind, and says what they are worth on source validation.

    Args:
        settings, dataset: of the run.
        statistics: averaged, or recomputed over the sources' training clips.

    Raises:
        SettingsError: the sources have no test split.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        *,
        statistics: str,
        device: torch.device,
        say: Say = SILENT,
    ) -> None:
        self.settings, self.dataset, self.device = settings, dataset, device
        self._recomputed = statistics == "recomputed"
        found = next((one for one in clip_sets(settings, dataset) if one.name == SOURCE), None)
        if found is None:
            raise SettingsError(
                "The source domains have no test split to judge an average by.",
                "Give some of their clips the split `test` and prepare again.",
            )
        self.validation = found.clips
        self._training = dataset.select(domains=source_domains(settings, dataset), splits=("train",))
        if self._recomputed:
            attach_trunks(settings, dataset, device=device, say=say)

    def model(self, checkpoint: Checkpoint, state: Tensors) -> tuple[MultiModalModel, Statistics]:
        """The model of weights like `checkpoint`'s student, and where its batch norms' statistics come from.

        Raises:
            MbcdError: a profile with negative weights has left a variance below zero.
        """
        weighed = replace(checkpoint, student=state, teacher=None)
        model = build_models(self.settings, self.dataset, weighed, device=self.device, source="averaged")["student"]
        norms = following(model) if self.settings.training.batch_norm != "frozen" else []
        if not norms:
            return model, Statistics("none", 0)
        if self._recomputed:
            clips = recompute(model, self._batches(), precision=self.settings.runtime.precision)
            return model, Statistics("recomputed", len(norms), clips)
        if any(bool((norm.running_var < 0).any()) for norm in norms):
            raise MbcdError(
                "Averaged with negative weights, a batch norm's variance fell below zero.",
                "Use --statistics recomputed.",
            )
        return model, Statistics("averaged", len(norms))

    def validated(self, model: MultiModalModel) -> HeadRecord:
        """Accuracy and loss of the fused head on the sources' test split."""
        batches = self.dataset.batches(self.validation, batch_size=self.settings.evaluation.batch_size, training=False)
        predictions = predict(model, batches, device=self.device, precision=self.settings.runtime.precision)
        return model_record(predictions).fused

    def _batches(self) -> Iterable[Batch]:
        training = self.settings.training
        how = {"batch_size": max(training.batch_size, 2), "training": True, "seed": training.seed}
        return (batch.to(self.device) for batch in self.dataset.batches(self._training, **how))


def following(model: MultiModalModel) -> list[_BatchNorm]:
    """The batch norms whose running statistics follow the training: not those of frozen stages."""
    with evaluating(model):
        model.train()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    return [norm for norm in norms if norm.running_mean is not None]


@torch.no_grad()
def recompute(model: MultiModalModel, batches: Iterable[Batch], *, precision: str) -> int:
    """Running statistics anew: their means over the batches, weighted by their clips; how many clips that were.

    As `torch.optim.swa_utils.update_bn`, but a short last batch does not count as a full one; without dropout.
    """
    norms, seen = following(model), 0
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        for batch in batches:
            if len(batch) < 2:  # one clip without positions has no variance
                continue
            seen += len(batch)
            for norm in norms:
                norm.momentum = len(batch) / seen
            with autocast(batch.labels.device, precision):
                model(batch.inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return seen
