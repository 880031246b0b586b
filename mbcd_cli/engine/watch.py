"""Signs of a training going wrong (method.md section 6, point 8), each reported once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

COLLAPSE = 0.9
"""A modality dropped from this fraction of a whole epoch's clips has collapsed."""
LAG = 0.25
"""Validation accuracy by which a teacher may stay behind its student in the second half of a training."""


def warnings(history: Sequence[Mapping[str, Any]], *, epochs: int) -> dict[str, str]:
    """Key -> text of every warning that the last record of `history` gives reason for.

    Args:
        history: records of metrics.jsonl.
        epochs: length of the training.
    """
    record, found = history[-1], {}
    for name, values in record["train"]["modalities"].items():
        if values["dropped"] >= COLLAPSE:
            found[f"collapse {name}"] = (
                f"epoch {record['epoch']}: modality {name} was dropped from {100 * values['dropped']:.0f} % of the "
                "clips (modality collapse). The other modalities may learn nothing: check their inputs, or try "
                "objective.dropout.strategy=fixed."
            )
    validation = record["validation"]
    if "teacher" in validation:
        gap = validation["student"]["fused"]["accuracy"] - validation["teacher"]["fused"]["accuracy"]
        if gap > LAG and record["epoch"] >= max(2, epochs / 2):
            found["lag"] = (
                f"epoch {record['epoch']}: the teacher is {100 * gap:.0f} points behind the student on the validation "
                "clips. The weight average is too slow for a training of this length: lower objective.teacher.beta."
            )
        drift = [one["validation"]["divergence"] for one in history[-4:]]
        rising = len(drift) == 4 and all(d is not None for d in drift) and all(a < b for a, b in pairwise(drift))
        if rising and drift[-1] > 1:
            found["divergence"] = (
                f"epoch {record['epoch']}: teacher and student drift apart (KL on the validation clips rose to "
                f"{drift[-1]:.2f} over the last epochs). Lower optimizer.lr or objective.teacher.beta."
            )
    return found
