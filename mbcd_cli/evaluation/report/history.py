"""Accuracy per epoch, from the records of a training's metrics.jsonl (or of its checkpoint)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class History:
    """Fused accuracies over training.

    Attributes:
        epochs: [E] epoch numbers, ascending.
        lines: (validation or target, teacher or student) -> E accuracies in 0..1, None where an epoch has none.
    """

    epochs: list[int]
    lines: dict[tuple[str, str], list[float | None]]

    def oracle(self, model: str) -> dict[str, Any] | None:
        """Epoch and accuracy of `model` at its best on the target: not a fair figure, it selects on the target."""
        line = self.lines.get(("target", model), [])
        known = [(value, -epoch) for value, epoch in zip(line, self.epochs, strict=False) if value is not None]
        if not known:
            return None
        value, epoch = max(known)
        return {"model": model, "epoch": -epoch, "top1": value}


def accuracy_history(records: Sequence[Mapping[str, Any]]) -> History | None:
    """The fused accuracies in `records`; None where there are none.

    A record is `{"epoch": 3, "validation": {"teacher": {"fused": {"accuracy": 0.9}}}, "target": {...}}`. Where an epoch
    is there twice (a resumed run), its last record counts.
    """
    by_epoch: dict[int, dict[tuple[str, str], float]] = {}
    for record in records:
        if not isinstance(record.get("epoch"), int):
            continue
        found = {}
        for clip_set in ("validation", "target"):
            for model in ("teacher", "student"):
                value = record
                for key in (clip_set, model, "fused", "accuracy"):
                    value = value.get(key) if isinstance(value, Mapping) else None
                if isinstance(value, (int, float)):
                    found[clip_set, model] = float(value)
        by_epoch[record["epoch"]] = found
    epochs = sorted(epoch for epoch, found in by_epoch.items() if found)
    if not epochs:
        return None
    names = list(dict.fromkeys(name for epoch in epochs for name in by_epoch[epoch]))
    return History(epochs, {name: [by_epoch[epoch].get(name) for epoch in epochs] for name in names})
