"""Accuracy and loss of student and teacher on held-out clips, once per epoch.

Letters: N clips, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.engine.objective import distillation, teacher_probabilities
from mbcd_cli.evaluation.metrics import cross_entropy, finite, top1
from mbcd_cli.evaluation.predict import Predictions, predict
from mbcd_cli.model import MultiModalModel


def figures(predictions: Predictions) -> dict[str, Any]:
    """Accuracy (0 to 1) and mean cross-entropy of the fused head and of every uni-modal head; None if not finite."""

    def one(logits: torch.Tensor) -> dict[str, float | None]:
        return {
            "accuracy": top1(logits, predictions.labels),
            "loss": finite(cross_entropy(logits, predictions.labels)),
        }

    return {
        "fused": one(predictions.fused),
        "unimodal": {name: one(logits) for name, logits in predictions.unimodal.items()},
    }


def validate(
    models: dict[str, MultiModalModel],
    batches: Callable[[], Iterable[Batch]],
    *,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    """Figures of every model on the same clips, by model name.

    Args:
        models: "teacher" (if any) and "student".
        batches: gives the clips anew on every call.

    Returns:
        model -> `figures`; with a teacher also "divergence", KL(teacher || student) of the fused predictions
        averaged over the clips (None if not finite).
    """
    predictions = {
        name: predict(model, batches(), device=device, precision=precision) for name, model in models.items()
    }
    result: dict[str, Any] = {name: figures(one) for name, one in predictions.items()}
    if "teacher" in predictions:
        target = teacher_probabilities(predictions["teacher"].fused.double())
        result["divergence"] = finite(distillation(target, predictions["student"].fused.double()).item())
    return result
