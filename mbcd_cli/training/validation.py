"""Accuracy and loss of student and teacher on held-out clips, once per epoch, and an epoch's record with them.

Letters: N clips, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mbcd_cli.json_values import OPTIONAL
from mbcd_cli.methods.parts import distillation, teacher_probabilities
from mbcd_cli.model import MultiModalModel
from mbcd_cli.scoring.deployed import deployed_of
from mbcd_cli.scoring.metrics import finite, mean_cross_entropy, top1
from mbcd_cli.scoring.predictions import Predictions
from mbcd_cli.scoring.unlabelled import UnlabelledRecord
from mbcd_cli.training.figures import Record


@dataclass(frozen=True, slots=True)
class Validation:
    """What a training asks for when an epoch is over: what its models say on held-out clips.

    Attributes:
        models: "teacher" (if any) and "student".
        clips: indices into the clip table, [N].
    """

    models: Mapping[str, MultiModalModel]
    clips: np.ndarray


@dataclass(frozen=True, slots=True)
class HeadRecord:
    """Accuracy (0 to 1) and mean cross-entropy (nats, None if not finite) of one head."""

    accuracy: float
    loss: float | None


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """Those of the fused head and, by modality, of every uni-modal head."""

    fused: HeadRecord
    unimodal: dict[str, HeadRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRecord:
    """Figures of a training's models on the same clips.

    Attributes:
        teacher: where weights are averaged.
        student: of the trained weights.
        divergence: with a teacher, KL(teacher || student) of the fused predictions averaged over the clips, in nats.
    """

    teacher: ModelRecord | None = field(default=None, metadata=OPTIONAL)
    student: ModelRecord
    divergence: float | None = field(default=None, metadata=OPTIONAL)

    @property
    def models(self) -> dict[str, ModelRecord]:
        """Those there are, by name."""
        return {"student": self.student} if self.teacher is None else {"teacher": self.teacher, "student": self.student}

    @property
    def deployed(self) -> ModelRecord:
        """Those of the model that is deployed."""
        return self.models[deployed_of(self.models)]


@dataclass(slots=True)
class EpochRecord:
    """A line of metrics.jsonl.

    Attributes:
        epoch: its number, from 1. step: steps done in all.
        train: means of the step's figures over the epoch's clips.
        validation: on the source domains' test split. target: on the target's, where there is one that is not sealed.
        unlabelled: what the deployed model's predictions on the target tell without its labels.
        best_epoch: the selected epoch so far. warnings: keys of the warnings so far.
    """

    epoch: int
    step: int
    train: Record
    validation: HeldOutRecord
    target: HeldOutRecord | None = field(default=None, metadata=OPTIONAL)
    unlabelled: UnlabelledRecord | None = field(default=None, metadata=OPTIONAL)
    best_epoch: int = 0
    warnings: list[str] = field(default_factory=list)


def model_record(predictions: Predictions) -> ModelRecord:
    """Figures of every head."""

    def of(logits: torch.Tensor) -> HeadRecord:
        loss = finite(mean_cross_entropy(logits, predictions.labels))
        return HeadRecord(top1(logits, predictions.labels), loss)

    return ModelRecord(of(predictions.fused), {name: of(logits) for name, logits in predictions.unimodal.items()})


def held_out_record(predictions: Mapping[str, Predictions]) -> HeldOutRecord:
    """Figures of a training's models ("teacher", if any, and "student") on the same clips."""
    divergence = None
    if "teacher" in predictions:
        target = teacher_probabilities(predictions["teacher"].fused.double())
        divergence = distillation(target, predictions["student"].fused.double()).item()
    return HeldOutRecord(**{name: model_record(told) for name, told in predictions.items()}, divergence=divergence)


def merged(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of several processes in the order of their ranks, as one."""
    if len(parts) == 1:
        return parts[0]
    return Predictions(
        labels=torch.cat([part.labels for part in parts]),
        domains=torch.cat([part.domains for part in parts]),
        clips=torch.cat([part.clips for part in parts]),
        fused=torch.cat([part.fused for part in parts]),
        unimodal={name: torch.cat([part.unimodal[name] for part in parts]) for name in parts[0].unimodal},
    )
