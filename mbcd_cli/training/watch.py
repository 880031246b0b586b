"""Signs of a training going wrong, each reported once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mbcd_cli.methods.base import Alarm

LAG = 0.25
"""Validation accuracy by which a teacher may stay behind its student in the second half of a training."""


def training_warnings(
    history: Sequence[Mapping[str, Any]], *, epochs: int, alarms: Sequence[Alarm] = ()
) -> dict[str, str]:
    """Key -> text of every warning that the last record of `history` gives reason for.

    Args:
        history: records of metrics.jsonl.
        epochs: length of the training.
        alarms: figures of the method to warn about.
    """
    record, found = history[-1], {}
    train = record["train"]
    for alarm in alarms:
        rows = {name: row[alarm.figure] for name, row in train["modalities"].items() if alarm.figure in row}
        for name, value in ({"": train[alarm.figure]} if alarm.figure in train else rows).items():
            if value >= alarm.least:
                text = alarm.text.format(modality=name, value=value, percent=100 * value)
                found[f"{alarm.key} {name}".strip()] = f"epoch {record['epoch']}: {text}"
    validation = record["validation"]
    if "teacher" in validation:
        gap = validation["student"]["fused"]["accuracy"] - validation["teacher"]["fused"]["accuracy"]
        if gap > LAG and record["epoch"] >= max(2, epochs / 2):
            found["lag"] = (
                f"epoch {record['epoch']}: the teacher is {100 * gap:.0f} points behind the student on the validation "
                "clips. The weight average is too slow for a training of this length: lower average.beta."
            )
        drift = [one["validation"]["divergence"] for one in history[-4:]]
        rising = len(drift) == 4 and all(d is not None for d in drift) and all(a < b for a, b in pairwise(drift))
        if rising and drift[-1] > 1:
            found["divergence"] = (
                f"epoch {record['epoch']}: teacher and student drift apart (KL on the validation clips rose to "
                f"{drift[-1]:.2f} over the last epochs). Lower optimizer.lr or average.beta."
            )
    return found
