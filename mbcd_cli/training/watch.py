"""Signs of a training going wrong, each reported once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mbcd_cli.methods.base import Alarm
from mbcd_cli.training.validation import EpochRecord

LAG = 0.25
"""Validation accuracy by which a teacher may stay behind its student in the second half of a training."""


def training_warnings(history: Sequence[EpochRecord], *, epochs: int, alarms: Sequence[Alarm] = ()) -> dict[str, str]:
    """Key -> text of every warning that the last record of `history` gives reason for.

    Args:
        history: of the epochs so far.
        epochs: length of the training.
        alarms: figures of the method to warn about.
    """
    record, texts = history[-1], {}
    train, validation = record.train, record.validation
    for alarm in alarms:
        rows = {name: row[alarm.figure] for name, row in train["modalities"].items() if alarm.figure in row}
        for name, value in ({"": train[alarm.figure]} if alarm.figure in train else rows).items():
            if value >= alarm.least:
                text = alarm.text.format(modality=name, value=value, percent=100 * value)
                texts[f"{alarm.key} {name}".strip()] = f"epoch {record.epoch}: {text}"
    if validation.teacher is not None:
        gap = validation.student.fused.accuracy - validation.teacher.fused.accuracy
        if gap > LAG and record.epoch >= max(2, epochs / 2):
            texts["lag"] = (
                f"epoch {record.epoch}: the teacher is {100 * gap:.0f} points behind the student on the validation "
                "clips. The weight average is too slow for a training of this length: lower average.beta."
            )
        drift = [earlier.validation.divergence for earlier in history[-4:]]
        rising = len(drift) == 4 and all(d is not None for d in drift) and all(a < b for a, b in pairwise(drift))
        if rising and drift[-1] > 1:
            texts["divergence"] = (
                f"epoch {record.epoch}: teacher and student drift apart (KL on the validation clips rose to "
                f"{drift[-1]:.2f} over the last epochs). Lower optimizer.lr or average.beta."
            )
    return texts
