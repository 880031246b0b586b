"""Accuracy and loss of student and teacher on held-out clips, once per epoch.

Letters: N clips, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.parts import distillation, teacher_probabilities
from mbcd_cli.model import MultiModalModel
from mbcd_cli.processes import ALONE, Group
from mbcd_cli.scoring.metrics import finite, mean_cross_entropy, top1
from mbcd_cli.scoring.predictions import Predictions, predict


def figures(predictions: Predictions) -> dict[str, Any]:
    """Accuracy (0 to 1) and mean cross-entropy of the fused head and of every uni-modal head; None if not finite."""

    def one(logits: torch.Tensor) -> dict[str, float | None]:
        return {
            "accuracy": top1(logits, predictions.labels),
            "loss": finite(mean_cross_entropy(logits, predictions.labels)),
        }

    return {
        "fused": one(predictions.fused),
        "unimodal": {name: one(logits) for name, logits in predictions.unimodal.items()},
    }


def validation_figures(
    models: dict[str, MultiModalModel],
    batches: Callable[[], Iterable[Batch]],
    *,
    device: torch.device,
    precision: str,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Figures of every model on the same clips, by model name.

    Args:
        models: "teacher" (if any) and "student".
        batches: gives the clips anew on every call; of this process, where several share them.
        group: the processes that share the clips; all get the figures of all clips.

    Returns:
        model -> `figures`; with a teacher also "divergence", KL(teacher || student) of the fused predictions
        averaged over the clips (None if not finite).
    """
    predictions = {
        name: _merged(group.gathered(predict(model, batches(), device=device, precision=precision)))
        for name, model in models.items()
    }
    result: dict[str, Any] = {name: figures(one) for name, one in predictions.items()}
    if "teacher" in predictions:
        target = teacher_probabilities(predictions["teacher"].fused.double())
        result["divergence"] = finite(distillation(target, predictions["student"].fused.double()).item())
    return result


def _merged(parts: list[Predictions]) -> Predictions:
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
