"""How far a model's confidence can be trusted: calibration, misclassification and out-of-distribution detection.

Confidence is the maximum softmax probability. A clip with non-finite logits has confidence 0 and is wrong.

Letters: N clips, C classes, K bins. Every function takes logits [N, C], labels [N], and confidences and `right` (0 or
1) [N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from mbcd_cli.scoring.metrics import finite, mean_cross_entropy, predicted, probabilities
from mbcd_cli.scoring.predictions import Predictions

TEMPERATURES = (0.05, 20.0)
"""Range in which a temperature is sought (a model that is always right wants 0)."""


def confidence(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Maximum softmax probability [N]."""
    return probabilities(logits, temperature).max(axis=1)


def reliability(confidences: ArrayLike, right: ArrayLike, *, bins: int = 15) -> list[dict[str, Any]]:
    """Clips, mean confidence and accuracy in K bins of equal width over (0, 1]; None in an empty bin."""
    confidences, right = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    # A confidence on an edge belongs to the bin below it (Guo et al. 2017); 0 belongs to the first.
    where = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    clips = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(where, weights=confidences, minlength=bins) / clips
        accuracy = np.bincount(where, weights=right, minlength=bins) / clips
    return [
        {
            "low": k / bins,
            "high": (k + 1) / bins,
            "clips": int(clips[k]),
            "confidence": finite(mean[k]),
            "accuracy": finite(accuracy[k]),
        }
        for k in range(bins)
    ]


def calibration_error(confidences: ArrayLike, right: ArrayLike, *, bins: int = 15) -> float:
    """Expected calibration error: mean |accuracy - confidence| of the bins, weighted by their clips."""
    table = reliability(confidences, right, bins=bins)
    total = sum(row["clips"] for row in table)
    return sum(r["clips"] * abs(r["accuracy"] - r["confidence"]) for r in table if r["clips"]) / total


def brier(logits: ArrayLike, labels: ArrayLike, temperature: float = 1.0) -> float:
    """Mean over clips of sum_c (p_c - [c is the label])^2, from 0 to 2."""
    p = probabilities(logits, temperature)
    p[np.arange(len(p)), np.asarray(labels)] -= 1.0
    return float((p**2).sum(axis=1).mean())


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature that minimises the cross-entropy of logits / T (Guo et al. 2017), within `TEMPERATURES`.

    Clips with non-finite logits are left out; with none left the temperature is 1.
    """
    values, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    sound = np.isfinite(values).all(axis=1)
    values, labels = values[sound], labels[sound]
    if not len(values):
        return 1.0
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return -log_softmax(values / np.exp(log_temperature), axis=1)[rows, labels].mean()

    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def risk_coverage(confidences: ArrayLike, right: ArrayLike) -> np.ndarray:
    """Error rate among the k most confident clips, k = 1..N, [N].

    Equally confident clips share their errors evenly: the expectation over every order of them.
    """
    confidences, wrong = np.asarray(confidences, np.float64), 1.0 - np.asarray(right, np.float64)
    _, group = np.unique(-confidences, return_inverse=True)
    shared = (np.bincount(group, weights=wrong) / np.bincount(group))[np.sort(group)]
    return np.cumsum(shared) / np.arange(1, len(wrong) + 1)


def aurc(confidences: ArrayLike, right: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean of `risk_coverage`; lower is better."""
    return float(risk_coverage(confidences, right).mean())


def separation(positive: ArrayLike, negative: ArrayLike) -> dict[str, float | None]:
    """How well a score tells positives (expected higher) from negatives; None where either is empty.

    Returns:
        auroc; aupr (average precision of the positives); fpr95, the smallest share of negatives accepted by a
        threshold that accepts at least 95 % of the positives.
    """
    positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if not len(positive) or not len(negative):
        return {"auroc": None, "aupr": None, "fpr95": None}
    truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    scores = np.r_[positive, negative]
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(truth, scores)),
        "aupr": float(average_precision_score(truth, scores)),
        # Rounding must not turn exactly 95 % into less.
        "fpr95": float(false[true >= 0.95 - 1e-12].min()),
    }


def trust_figures(logits: ArrayLike, labels: ArrayLike, *, temperature: float, bins: int = 15) -> dict[str, Any]:
    """Calibration before and after `temperature`, and misclassification detection, of one head."""
    labels = np.asarray(labels)
    right = predicted(logits) == labels
    before, after = confidence(logits), confidence(logits, temperature)
    scaled = np.asarray(logits, np.float64) / temperature
    return {
        "accuracy": float(right.mean()),
        "mean_confidence": float(before.mean()),
        "ece": calibration_error(before, right, bins=bins),
        "brier": brier(logits, labels),
        "loss": finite(mean_cross_entropy(logits, labels)),
        "scaled": {
            "mean_confidence": float(after.mean()),
            "ece": calibration_error(after, right, bins=bins),
            "brier": brier(logits, labels, temperature),
            "loss": finite(mean_cross_entropy(scaled, labels)),
        },
        "aurc": aurc(before, right),
        **{k: v for k, v in separation(before[right], before[~right]).items() if k != "aupr"},
        "reliability": reliability(before, right, bins=bins),
        "reliability_scaled": reliability(after, right, bins=bins),
        "risk": _curve(risk_coverage(before, right)),
    }


def _curve(risk: np.ndarray) -> dict[str, list[float]]:
    """At most 100 points of a risk-coverage curve, for plots."""
    at = np.unique(np.linspace(0, len(risk) - 1, 100).round().astype(int))
    return {"coverage": ((at + 1) / len(risk)).tolist(), "risk": risk[at].tolist()}


def trust(sets: Mapping[str, Predictions], *, bins: int = 15) -> dict[str, Any]:
    """Trust figures of every head on every set; temperatures are fitted on "source" (held-out clips) alone.

    Args:
        sets: "source" and/or "target" -> predictions of one model. Without "source" nothing is scaled.
    """

    def heads(predictions: Predictions) -> dict[str, Any]:
        return {"fused": predictions.fused, **predictions.unimodal}

    source = sets.get("source")
    first = next(iter(sets.values()))
    temperatures = {
        name: fit_temperature(heads(source)[name], source.labels) if source is not None else 1.0
        for name in heads(first)
    }
    return {
        "bins": bins,
        "temperature": temperatures,
        "temperature_fitted": source is not None,
        "sets": {
            clip_set: {
                name: trust_figures(logits, predictions.labels, temperature=temperatures[name], bins=bins)
                for name, logits in heads(predictions).items()
            }
            for clip_set, predictions in sets.items()
        },
    }


def ood_scores(logits: ArrayLike) -> dict[str, np.ndarray]:
    """Scores that are higher on familiar input, each [N]: maximum softmax, maximum logit, free energy (negated)."""
    values = np.asarray(logits, np.float64)
    values = np.where(np.isfinite(values).all(axis=1, keepdims=True), values, -np.finfo(np.float32).max)
    return {
        "max softmax": confidence(logits),
        "max logit": values.max(axis=1),
        "energy": logsumexp(values, axis=1),
    }


def out_of_distribution(familiar: Predictions, foreign: Predictions) -> dict[str, dict[str, float | None]]:
    """Per score of the fused head, how well it tells `familiar` clips (positives) from `foreign` ones."""
    inside, outside = ood_scores(familiar.fused), ood_scores(foreign.fused)
    return {name: separation(inside[name], outside[name]) for name in inside}
