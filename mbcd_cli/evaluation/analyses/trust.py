"""How far a model's confidence can be trusted: calibration, misclassification and out-of-distribution detection.

Confidence is the maximum softmax probability. A clip with non-finite logits has confidence 0 and is wrong.

Letters: N clips, C classes, K bins. Every function takes logits [N, C], labels [N], and confidences and `right` (0 or
1) [N]. Errors, accuracies and shares are fractions, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, logsumexp

from mbcd_cli.scoring.metrics import finite, mean_cross_entropy, predicted, probabilities
from mbcd_cli.scoring.predictions import Predictions

TEMPERATURES = (0.05, 20.0)
"""Range in which a temperature is sought (a model that is always right wants 0)."""


@dataclass(frozen=True, slots=True)
class ConfidenceBin:
    """Clips whose confidence lies in (low, high]: how many, their mean confidence and accuracy; None without any."""

    low: float
    high: float
    clips: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Separation:
    """How well a score tells positives (expected higher) from negatives; None where either is empty.

    Attributes:
        auroc: area under the ROC curve. aupr: average precision of the positives.
        fpr95: the smallest share of negatives accepted by a threshold that accepts at least 95 % of the positives.
    """

    auroc: float | None
    aupr: float | None
    fpr95: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Mean confidence, expected calibration error, Brier score (0 to 2) and mean cross-entropy in nats."""

    mean_confidence: float
    ece: float
    brier: float
    loss: float | None


@dataclass(frozen=True, slots=True)
class RiskCurve:
    """At most 100 points of a risk-coverage curve, for plots: share of the clips, and error rate among them."""

    coverage: list[float]
    risk: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTrust(Calibration):
    """Of one head: its calibration as it is and `scaled` by its temperature, and how it detects its own errors.

    Attributes:
        aurc: area under the risk-coverage curve. auroc, fpr95: of the confidence, right clips being the positives.
        reliability, reliability_scaled: K bins each.
    """

    accuracy: float
    scaled: Calibration
    aurc: float
    auroc: float | None
    fpr95: float | None
    reliability: list[ConfidenceBin]
    reliability_scaled: list[ConfidenceBin]
    risk: RiskCurve


@dataclass(frozen=True, slots=True)
class TrustFigures:
    """Trust of every head on every set of clips.

    Attributes:
        bins: K.
        temperature: of every head; 1 unless `temperature_fitted`.
        sets: source and target, head -> figures.
    """

    bins: int
    temperature: dict[str, float]
    temperature_fitted: bool
    sets: dict[str, dict[str, HeadTrust]]


def confidence(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Maximum softmax probability of logits / temperature, [N] float64."""
    return probabilities(logits, temperature).max(axis=1)


def reliability(confidences: ArrayLike, right: ArrayLike, *, bins: int = 15) -> list[ConfidenceBin]:
    """Clips, mean confidence and accuracy in K = `bins` bins of equal width over (0, 1] (Guo et al. 2017)."""
    confidences, right = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    # A confidence on an edge belongs to the bin below it (Guo et al. 2017); 0 belongs to the first.
    where = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    clips = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(where, weights=confidences, minlength=bins) / clips
        accuracy = np.bincount(where, weights=right, minlength=bins) / clips
    return [
        ConfidenceBin(k / bins, (k + 1) / bins, int(clips[k]), finite(mean[k]), finite(accuracy[k]))
        for k in range(bins)
    ]


def calibration_error(confidences: ArrayLike, right: ArrayLike, *, bins: int = 15) -> float:
    """Expected calibration error: sum_k clips_k / N * |accuracy_k - confidence_k| over the bins (Guo et al. 2017)."""
    table = reliability(confidences, right, bins=bins)
    total = sum(row.clips for row in table)
    return sum(row.clips * abs(row.accuracy - row.confidence) for row in table if row.clips) / total


def brier(logits: ArrayLike, labels: ArrayLike, temperature: float = 1.0) -> float:
    """Mean over the N clips of sum_c (p_c - [c is the label])^2, p = softmax(logits / temperature); from 0 to 2."""
    p = probabilities(logits, temperature)
    p[np.arange(len(p)), np.asarray(labels)] -= 1.0
    return float((p**2).sum(axis=1).mean())


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature T that minimises the mean cross-entropy of softmax(logits / T) (Guo et al. 2017), within
    `TEMPERATURES`.

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
    from scipy.optimize import minimize_scalar  # a third of a second to import

    minimum = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(minimum.x))


def risk_coverage(confidences: ArrayLike, right: ArrayLike) -> np.ndarray:
    """Error rate among the k most confident clips, k = 1..N, [N] float64 (Geifman and El-Yaniv 2017).

    Equally confident clips share their errors evenly: the expectation over every order of them.
    """
    confidences, wrong = np.asarray(confidences, np.float64), 1.0 - np.asarray(right, np.float64)
    _, group = np.unique(-confidences, return_inverse=True)
    shared = (np.bincount(group, weights=wrong) / np.bincount(group))[np.sort(group)]
    return np.cumsum(shared) / np.arange(1, len(wrong) + 1)


def aurc(confidences: ArrayLike, right: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean of `risk_coverage`; lower is better."""
    return float(risk_coverage(confidences, right).mean())


def separation(positive: ArrayLike, negative: ArrayLike) -> Separation:
    """How well a score tells positives (scores [P], expected higher) from negatives (scores [Q])."""
    positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if not len(positive) or not len(negative):
        return Separation(None, None, None)
    truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    scores = np.r_[positive, negative]
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # a second of imports

    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    return Separation(
        auroc=float(roc_auc_score(truth, scores)),
        aupr=float(average_precision_score(truth, scores)),
        # Rounding must not turn exactly 95 % into less.
        fpr95=float(false[true >= 0.95 - 1e-12].min()),
    )


def calibration(logits: ArrayLike, labels: ArrayLike, *, temperature: float = 1.0, bins: int = 15) -> Calibration:
    """Of softmax(logits / temperature), [N, C], with K = `bins` bins."""
    confidences = confidence(logits, temperature)
    return Calibration(
        mean_confidence=float(confidences.mean()),
        ece=calibration_error(confidences, predicted(logits) == np.asarray(labels), bins=bins),
        brier=brier(logits, labels, temperature),
        loss=finite(mean_cross_entropy(np.asarray(logits, np.float64) / temperature, labels)),
    )


def head_trust(logits: ArrayLike, labels: ArrayLike, *, temperature: float, bins: int = 15) -> HeadTrust:
    """Calibration before and after `temperature`, and misclassification detection, of one head's logits [N, C]."""
    right = predicted(logits) == np.asarray(labels)
    confidences = confidence(logits)
    detection = separation(confidences[right], confidences[~right])
    return HeadTrust(
        **asdict(calibration(logits, labels, bins=bins)),
        accuracy=float(right.mean()),
        scaled=calibration(logits, labels, temperature=temperature, bins=bins),
        aurc=aurc(confidences, right),
        auroc=detection.auroc,
        fpr95=detection.fpr95,
        reliability=reliability(confidences, right, bins=bins),
        reliability_scaled=reliability(confidence(logits, temperature), right, bins=bins),
        risk=_curve(risk_coverage(confidences, right)),
    )


def _curve(risk: np.ndarray) -> RiskCurve:
    at = np.unique(np.linspace(0, len(risk) - 1, 100).round().astype(int))
    return RiskCurve(((at + 1) / len(risk)).tolist(), risk[at].tolist())


def trust_figures(sets: Mapping[str, Predictions], *, bins: int = 15) -> TrustFigures:
    """Trust of every head on every set; temperatures are fitted on "source" (held-out clips) alone.

    Args:
        sets: "source" and/or "target" -> predictions of one model. Without "source" nothing is scaled.
        bins: K.
    """
    source = sets.get("source")
    temperatures = {
        name: fit_temperature(source.heads[name], source.labels) if source is not None else 1.0
        for name in next(iter(sets.values())).heads
    }
    return TrustFigures(
        bins=bins,
        temperature=temperatures,
        temperature_fitted=source is not None,
        sets={
            clip_set: {
                name: head_trust(logits, predictions.labels, temperature=temperatures[name], bins=bins)
                for name, logits in predictions.heads.items()
            }
            for clip_set, predictions in sets.items()
        },
    )


def ood_scores(logits: ArrayLike) -> dict[str, np.ndarray]:
    """Scores that are higher on familiar input, each [N] float64: maximum softmax probability (Hendrycks and Gimpel
    2017), maximum logit, and negated free energy, log sum_c exp(logit_c) (Liu et al. 2020)."""
    values = np.asarray(logits, np.float64)
    values = np.where(np.isfinite(values).all(axis=1, keepdims=True), values, -np.finfo(np.float32).max)
    return {
        "max softmax": confidence(logits),
        "max logit": values.max(axis=1),
        "energy": logsumexp(values, axis=1),
    }


@dataclass(frozen=True, slots=True)
class ForeignClips:
    """How the clips of another dataset are told from ours: its name, its clips, and source and target against them."""

    dataset: str
    clips: int
    against: dict[str, dict[str, Separation]]


def out_of_distribution(familiar: Predictions, foreign: Predictions) -> dict[str, Separation]:
    """Per score of the fused head, how well it tells `familiar` clips (positives) from `foreign` ones."""
    inside, outside = ood_scores(familiar.fused), ood_scores(foreign.fused)
    return {name: separation(inside[name], outside[name]) for name in inside}
