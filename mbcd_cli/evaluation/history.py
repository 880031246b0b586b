"""Accuracy per epoch, read from a run folder's metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class History:
    """Accuracies over training.

    Attributes:
        epochs: [E] epoch numbers, ascending.
        lines: name (such as "teacher, target") -> E accuracies in 0..1, None where an epoch has none.
    """

    epochs: list[int]
    lines: dict[str, list[float | None]]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], float]:
    if isinstance(value, Mapping):
        return {p: v for key, inner in value.items() for p, v in _leaves(inner, (*path, str(key))).items()}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {path: float(value)}
    return {}


def _line(path: Sequence[str]) -> str | None:
    words = [word for part in path for word in part.replace("/", "_").split("_")]
    if "fused" not in words or not {"top1", "accuracy", "acc"} & set(words) or "class" in words:
        return None
    return " ".join(w for w in words if w not in ("fused", "top1", "accuracy", "acc"))


def accuracy_history(records: Sequence[Mapping[str, Any]]) -> History | None:
    """The fused accuracies in `records`, one line per model and set of clips; None where there are none.

    A record holds `epoch` and figures, nested or flat, whose names say what they are (fused, top1, accuracy).
    Where an epoch was run twice (a resumed run), its last record counts.
    """
    by_epoch: dict[int, dict[str, float]] = {}
    for record in records:
        if "epoch" not in record:
            continue
        found = {_line(path): value for path, value in _leaves(record).items()}
        found.pop(None, None)
        if found:
            by_epoch[int(record["epoch"])] = found
    if not by_epoch:
        return None
    epochs = sorted(by_epoch)
    names = list(dict.fromkeys(name for e in epochs for name in by_epoch[e]))
    return History(epochs, {name: [by_epoch[e].get(name) for e in epochs] for name in names})
