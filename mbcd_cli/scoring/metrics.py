"""Accuracy and loss from logits: plain functions, scikit-learn underneath where it has the thing.

Letters: N clips, C classes. Every function takes logits [N, C] and labels [N] as arrays or tensors.

Conventions: among equal logits the lower class index wins, everywhere. A clip with a logit that is not finite
has no prediction (class -1) and counts as wrong. A class or domain without clips has no accuracy (None) and
is left out of means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, softmax

from mbcd_cli.scoring.predictions import Predictions


def predicted(logits: ArrayLike) -> np.ndarray:
    """[N, C] -> predicted classes [N] int64; -1 where a logit is not finite."""
    values = np.asarray(logits)
    return np.where(np.isfinite(values).all(axis=1), values.argmax(axis=1), -1).astype(np.int64)


def top1(logits: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of clips whose predicted class is the label."""
    return float((predicted(logits) == np.asarray(labels)).mean())


def top_k(logits: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Fraction of clips whose label is among the k largest logits (k is at most C)."""
    values, labels = np.asarray(logits), np.asarray(labels)
    # A stable descending order settles ties as argmax does.
    best = np.argsort(-values, axis=1, kind="stable")[:, :k]
    hit = (best == labels[:, None]).any(axis=1) & np.isfinite(values).all(axis=1)
    return float(hit.mean())


def confusion_matrix(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Counts [C, C]: row the label, column the prediction; clips without a prediction are left out."""
    guesses, labels = predicted(logits), np.asarray(labels)
    classes, known = np.asarray(logits).shape[1], guesses >= 0
    pairs = labels[known] * classes + guesses[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def class_accuracy(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Accuracy on each class's clips, [C] float64; NaN for a class without clips."""
    return _group_accuracy(logits, labels, np.asarray(labels), np.asarray(logits).shape[1])


def mean_class_accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the accuracies of the classes that have clips (balanced accuracy)."""
    return float(np.nanmean(class_accuracy(logits, labels)))


def macro_f1(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the classes that have clips of F1 = 2 TP / (clips of the class + clips predicted as it)."""
    labels, guesses = np.asarray(labels), predicted(logits)
    classes = np.asarray(logits).shape[1]
    clips = np.bincount(labels, minlength=classes)
    told = np.bincount(guesses[guesses >= 0], minlength=classes)
    right = np.bincount(labels[guesses == labels], minlength=classes)
    return float((2 * right / np.maximum(clips + told, 1))[clips > 0].mean())


def domain_accuracy(logits: ArrayLike, labels: ArrayLike, domains: ArrayLike, count: int) -> np.ndarray:
    """Accuracy on each domain's clips, [count] float64; NaN for a domain without clips."""
    return _group_accuracy(logits, labels, np.asarray(domains), count)


def mean_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean cross-entropy in nats, in float64; infinite or NaN where logits are."""
    labels = np.asarray(labels)
    with np.errstate(invalid="ignore"):
        log_p = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    return float(-log_p[np.arange(len(labels)), labels].mean())


def _group_accuracy(logits: ArrayLike, labels: ArrayLike, groups: np.ndarray, count: int) -> np.ndarray:
    right = (predicted(logits) == np.asarray(labels)).astype(np.float64)
    clips = np.bincount(groups, minlength=count)
    with np.errstate(invalid="ignore"):
        return np.bincount(groups, weights=right, minlength=count) / clips


def finite(value: float) -> float | None:
    """`value`, or None where it is not finite (JSON has no NaN)."""
    return float(value) if np.isfinite(value) else None


def summary(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_names: Sequence[str],
    k: int = 5,
    domains: ArrayLike = None,
    domain_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Every accuracy figure of one head on one set of clips, as plain JSON-able values.

    Args:
        logits: [N, C], N >= 1.
        labels: [N].
        label_names: C names, in label order.
        k: for the top-k accuracy; clipped to C and recorded.
        domains: [N] indices into `domain_names`; None leaves the domains out.

    Returns:
        clips, top1, top_k and k, mean_class_accuracy, macro_f1, loss, unpredicted (clips with non-finite logits),
        per_class and per_domain (name -> clips, accuracy), confusion [C][C].
    """
    labels = np.asarray(labels)
    k = min(k, len(label_names))
    out: dict[str, Any] = {
        "clips": len(labels),
        "top1": top1(logits, labels),
        "k": k,
        "top_k": top_k(logits, labels, k),
        "mean_class_accuracy": mean_class_accuracy(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "loss": finite(mean_cross_entropy(logits, labels)),
        "unpredicted": int((predicted(logits) < 0).sum()),
        "per_class": _named(label_names, labels, class_accuracy(logits, labels)),
        "confusion": confusion_matrix(logits, labels).tolist(),
    }
    if domains is not None:
        domains = np.asarray(domains)
        figures = domain_accuracy(logits, labels, domains, len(domain_names))
        out["per_domain"] = {n: v for n, v in _named(domain_names, domains, figures).items() if v["clips"]}
    return out


def _named(names: Sequence[str], groups: np.ndarray, figures: np.ndarray) -> dict[str, dict[str, Any]]:
    clips = np.bincount(groups, minlength=len(names))
    return {
        name: {"clips": int(n), "accuracy": finite(figure)}
        for name, n, figure in zip(names, clips, figures, strict=True)
    }


def summaries(
    predictions: Predictions, *, label_names: Sequence[str], domain_names: Sequence[str], k: int = 5
) -> dict[str, dict[str, Any]]:
    """`summary` of the fused head ("fused") and of every modality's own head (by its name)."""
    heads: Mapping[str, Any] = {"fused": predictions.fused, **predictions.unimodal}
    return {
        name: summary(
            logits,
            predictions.labels,
            label_names=label_names,
            k=k,
            domains=predictions.domains,
            domain_names=domain_names,
        )
        for name, logits in heads.items()
    }


def probabilities(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature), [N, C] float64; a row of zeros where a logit is not finite."""
    values = np.asarray(logits, dtype=np.float64)
    sound = np.isfinite(values).all(axis=1, keepdims=True)
    return np.where(sound, softmax(np.where(sound, values, 0.0) / temperature, axis=1), 0.0)
