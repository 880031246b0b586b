"""Accuracy and loss from logits: plain functions.

Letters: N clips, C classes. Every function takes logits [N, C] and labels [N] (0 to C - 1) as arrays or tensors, N at
least 1.

Conventions: among equal logits the lower class index wins, everywhere. A clip with a logit that is not finite
has no prediction (class -1) and counts as wrong. A class or domain without clips has no accuracy (None) and
is left out of means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, softmax

from mbcd_cli.scoring.predictions import Predictions


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """Of one class or domain: its clips, and the accuracy (0 to 1) on them; None without any."""

    clips: int
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class HeadFigures:
    """Every accuracy figure of one head on one set of N clips; accuracies are fractions, from 0 to 1.

    Attributes:
        clips: N. k: of the top-k accuracy, at most C.
        loss: mean cross-entropy in nats; None where it is not finite.
        unpredicted: clips with logits that are not finite.
        per_class, per_domain: by name; only domains that have clips.
        confusion: counts [C][C], row the label, column the prediction.
    """

    clips: int
    top1: float
    k: int
    top_k: float
    mean_class_accuracy: float
    macro_f1: float
    loss: float | None
    unpredicted: int
    per_class: dict[str, GroupFigures]
    confusion: list[list[int]]
    per_domain: dict[str, GroupFigures] = field(default_factory=dict)


def predicted(logits: ArrayLike) -> np.ndarray:
    """[N, C] -> predicted classes [N] int64; -1 where a logit is not finite."""
    values = np.asarray(logits)
    return np.where(np.isfinite(values).all(axis=1), values.argmax(axis=1), -1).astype(np.int64)


def top1(logits: ArrayLike, labels: ArrayLike) -> float:
    """Fraction (0 to 1) of the N clips whose predicted class is the label."""
    return float((predicted(logits) == np.asarray(labels)).mean())


def top_k(logits: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Fraction (0 to 1) of the N clips whose label is among the k largest logits (k is at most C)."""
    values, labels = np.asarray(logits), np.asarray(labels)
    # A stable descending order settles ties as argmax does.
    best = np.argsort(-values, axis=1, kind="stable")[:, :k]
    hit = (best == labels[:, None]).any(axis=1) & np.isfinite(values).all(axis=1)
    return float(hit.mean())


def confusion_matrix(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Counts [C, C] int64: row the label, column the prediction; clips without a prediction are left out."""
    guesses, labels = predicted(logits), np.asarray(labels)
    classes, sound = np.asarray(logits).shape[1], guesses >= 0
    pairs = labels[sound] * classes + guesses[sound]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def class_accuracy(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Accuracy on each class's clips, [C] float64; NaN for a class without clips."""
    return _group_accuracy(logits, labels, np.asarray(labels), np.asarray(logits).shape[1])


def mean_class_accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the accuracies (0 to 1) of the classes that have clips (balanced accuracy)."""
    return float(np.nanmean(class_accuracy(logits, labels)))


def macro_f1(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the classes that have clips of F1 = 2 TP / (clips of the class + clips predicted as it), 0 to 1."""
    labels, guesses = np.asarray(labels), predicted(logits)
    classes = np.asarray(logits).shape[1]
    clips = np.bincount(labels, minlength=classes)
    guessed = np.bincount(guesses[guesses >= 0], minlength=classes)
    right = np.bincount(labels[guesses == labels], minlength=classes)
    return float((2 * right / np.maximum(clips + guessed, 1))[clips > 0].mean())


def domain_accuracy(logits: ArrayLike, labels: ArrayLike, domains: ArrayLike, count: int) -> np.ndarray:
    """Accuracy on each domain's clips, [count] float64, for `domains` [N] in 0..count - 1; NaN without clips."""
    return _group_accuracy(logits, labels, np.asarray(domains), count)


def mean_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the N clips of -log softmax(logits)[label], in nats, in float64; infinite or NaN where logits are."""
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


def head_figures(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_names: Sequence[str],
    k: int = 5,
    domains: ArrayLike | None = None,
    domain_names: Sequence[str] = (),
) -> HeadFigures:
    """Every accuracy figure of one head on one set of clips.

    Args:
        logits: [N, C], N >= 1.
        labels: [N].
        label_names: C names, in label order.
        k: for the top-k accuracy; clipped to C and recorded.
        domains: [N] indices into `domain_names`; None leaves the domains out.
    """
    labels = np.asarray(labels)
    k = min(k, len(label_names))
    per_domain = {}
    if domains is not None:
        domains = np.asarray(domains)
        accuracies = domain_accuracy(logits, labels, domains, len(domain_names))
        by_name = _named(domain_names, domains, accuracies)
        per_domain = {name: figures for name, figures in by_name.items() if figures.clips}
    return HeadFigures(
        clips=len(labels),
        top1=top1(logits, labels),
        k=k,
        top_k=top_k(logits, labels, k),
        mean_class_accuracy=mean_class_accuracy(logits, labels),
        macro_f1=macro_f1(logits, labels),
        loss=finite(mean_cross_entropy(logits, labels)),
        unpredicted=int((predicted(logits) < 0).sum()),
        per_class=_named(label_names, labels, class_accuracy(logits, labels)),
        confusion=confusion_matrix(logits, labels).tolist(),
        per_domain=per_domain,
    )


def _named(names: Sequence[str], groups: np.ndarray, accuracies: np.ndarray) -> dict[str, GroupFigures]:
    clips = np.bincount(groups, minlength=len(names))
    rows = zip(names, clips, accuracies, strict=True)
    return {name: GroupFigures(int(count), finite(accuracy)) for name, count, accuracy in rows}


def figures_of_heads(
    predictions: Predictions, *, label_names: Sequence[str], domain_names: Sequence[str], k: int = 5
) -> dict[str, HeadFigures]:
    """`head_figures` of the fused head ("fused") and of every modality's own head (by its name)."""
    return {
        name: head_figures(
            logits,
            predictions.labels,
            label_names=label_names,
            k=k,
            domains=predictions.domains,
            domain_names=domain_names,
        )
        for name, logits in predictions.heads.items()
    }


def probabilities(logits: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature), [N, C] float64; a row of zeros where a logit is not finite."""
    values = np.asarray(logits, dtype=np.float64)
    sound = np.isfinite(values).all(axis=1, keepdims=True)
    return np.where(sound, softmax(np.where(sound, values, 0.0) / temperature, axis=1), 0.0)
