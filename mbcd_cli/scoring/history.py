"""Accuracy per epoch, from the records of a training's metrics.jsonl (or of its checkpoint).

A record is `{"epoch": 3, "validation": {"teacher": {"fused": {"accuracy": 0.9}}}, "target": {...}}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CLIPS, MODELS = ("validation", "target"), ("teacher", "student")


@dataclass(frozen=True, slots=True)
class Oracle:
    """Epoch and accuracy (0 to 1) of `model` at its best on the target: not a fair figure, it selects on the target."""

    model: str
    epoch: int
    top1: float


@dataclass(frozen=True, slots=True)
class History:
    """Fused accuracies over training.

    Attributes:
        epochs: [E] epoch numbers, ascending.
        lines: (validation or target, teacher or student) -> E accuracies in 0..1, None where an epoch has none.
    """

    epochs: list[int]
    lines: dict[tuple[str, str], list[float | None]]

    def oracle(self, model: str) -> Oracle | None:
        """`model` at the first epoch of those where it is best on the target; None without a target."""
        line = self.lines.get(("target", model), [])
        measured = [(value, -epoch) for value, epoch in zip(line, self.epochs, strict=False) if value is not None]
        if not measured:
            return None
        value, epoch = max(measured)
        return Oracle(model, -epoch, value)


def fused_accuracy(record: Mapping[str, object], clips: str, model: str) -> float | None:
    """Of `model` on validation or target clips; None where the record does not tell it."""
    value: object = record
    for key in (clips, model, "fused", "accuracy"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def accuracy_history(records: Sequence[Mapping[str, object]]) -> History | None:
    """The fused accuracies in `records`; None where there are none.

    Where an epoch is there twice (a resumed run), its last record counts.
    """
    names = [(clips, model) for clips in CLIPS for model in MODELS]
    by_epoch: dict[int, dict[tuple[str, str], float]] = {}
    for record in records:
        epoch = record.get("epoch")
        if isinstance(epoch, int):
            accuracies = {name: fused_accuracy(record, *name) for name in names}
            by_epoch[epoch] = {name: value for name, value in accuracies.items() if value is not None}
    epochs = sorted(epoch for epoch, accuracies in by_epoch.items() if accuracies)
    if not epochs:
        return None
    named = dict.fromkeys(name for epoch in epochs for name in by_epoch[epoch])
    return History(epochs, {name: [by_epoch[epoch].get(name) for epoch in epochs] for name in named})
