"""What predictions on a target say of themselves, without its labels.

Letters: N clips of the target, S held-out clips of the sources, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from mbcd_cli.scoring.metrics import predicted, probabilities
from mbcd_cli.scoring.predictions import Predictions


@dataclass(frozen=True, slots=True)
class UnlabelledRecord:
    """Estimates of a model's accuracy on the target, 0 to 1, that read none of its labels.

    Attributes:
        agreement: share of clips of which two heads say the same class, over all pairs of heads (Jiang et al., 2022).
        confidence: share of clips above the confidence that as many held-out source clips exceed as are right
            (average thresholded confidence, Garg et al., 2022).
    """

    agreement: float
    confidence: float


def unlabelled_record(source: Predictions, target: Predictions) -> UnlabelledRecord:
    """The estimates for `target` (its labels are not read), a model's predictions; `source`: on S clips with labels."""
    return UnlabelledRecord(agreement(target), thresholded_confidence(source.fused, source.labels, target.fused))


def agreement(predictions: Predictions) -> float:
    """Share of clips and pairs of heads, the fused one included, that say the same class; no class agrees with none."""
    said = [predicted(logits) for logits in predictions.heads.values()]
    return float(np.mean([(one == other) & (one >= 0) for one, other in combinations(said, 2)]))


def thresholded_confidence(source: ArrayLike, labels: ArrayLike, target: ArrayLike) -> float:
    """Share of the rows of `target` [N, C] whose largest probability is above a limit: the one that as many rows of
    `source` [S, C] are below as are wrong by `labels` [S]."""
    wrong = int((predicted(source) != np.asarray(labels)).sum())
    sure = np.sort(probabilities(source).max(axis=1))
    if wrong == len(sure):
        return 0.0
    return float((probabilities(target).max(axis=1) >= sure[wrong]).mean())


def said_classes(predictions: Predictions) -> dict[str, object]:
    """{"fused": [N] classes, "unimodal": {modality: [N]}}, -1 for none: what is kept of a sealed target."""
    fused, *unimodal = (predicted(logits).tolist() for logits in predictions.heads.values())
    return {"fused": fused, "unimodal": dict(zip(predictions.unimodal, unimodal, strict=True))}
