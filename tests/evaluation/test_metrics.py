from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mbcd_cli.scoring import metrics as m


def random_case(seed: int, clips: int = 200, classes: int = 7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(clips, classes)).astype(np.float32), rng.integers(0, classes, clips)


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed):
    logits, labels = random_case(seed)
    guesses = logits.argmax(1)
    assert m.top1(logits, labels) == pytest.approx(sk.accuracy_score(labels, guesses))
    assert m.mean_class_accuracy(logits, labels) == pytest.approx(sk.balanced_accuracy_score(labels, guesses))
    for k in (1, 3, 6):
        theirs = sk.top_k_accuracy_score(labels, logits, k=k, labels=np.arange(7))
        assert m.top_k(logits, labels, k) == pytest.approx(theirs)
    np.testing.assert_array_equal(m.confusion_matrix(logits, labels), sk.confusion_matrix(labels, guesses))
    np.testing.assert_allclose(m.class_accuracy(logits, labels), sk.recall_score(labels, guesses, average=None))
    probabilities = torch.tensor(logits).double().softmax(1).numpy()
    assert m.mean_cross_entropy(logits, labels) == pytest.approx(sk.log_loss(labels, probabilities), rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 10_000))
def test_against_plain_loops_with_ties_and_absent_classes(clips, classes, seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-1, 2, (clips, classes)).astype(float)  # few values: many ties
    labels, domains = rng.integers(0, classes, clips), rng.integers(0, 3, clips)
    order = [sorted(range(classes), key=lambda c, row=row: (-row[c], c)) for row in logits]
    right = [o[0] == y for o, y in zip(order, labels, strict=True)]
    assert m.top1(logits, labels) == pytest.approx(sum(right) / clips)
    for k in range(1, classes + 1):
        expected = sum(y in o[:k] for o, y in zip(order, labels, strict=True)) / clips
        assert m.top_k(logits, labels, k) == pytest.approx(expected)
    per_class = []
    for c in range(classes):
        mine = [r for r, y in zip(right, labels, strict=True) if y == c]
        value = m.class_accuracy(logits, labels)[c]
        if mine:
            per_class.append(sum(mine) / len(mine))
            assert value == pytest.approx(per_class[-1])
        else:
            assert math.isnan(value)
    assert m.mean_class_accuracy(logits, labels) == pytest.approx(sum(per_class) / len(per_class))
    loss = sum(math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in zip(logits, labels, strict=True))
    assert m.mean_cross_entropy(logits, labels) == pytest.approx(loss / clips)
    report = m.head_figures(
        logits,
        labels,
        label_names=[str(c) for c in range(classes)],
        k=3,
        domains=domains,
        domain_names=["a", "b", "c"],
    )
    assert report.k == min(3, classes)
    assert sum(entry.clips for entry in report.per_class.values()) == clips
    for d, name in enumerate("abc"):
        mine = [r for r, y in zip(right, domains, strict=True) if y == d]
        if mine:
            figures = report.per_domain[name]
            assert (figures.clips, figures.accuracy) == (len(mine), pytest.approx(np.mean(mine)))
        else:
            assert name not in report.per_domain


def test_all_right_all_wrong_and_one_clip():
    labels = np.arange(4)
    assert m.top1(np.eye(4), labels) == m.mean_class_accuracy(np.eye(4), labels) == 1.0
    assert m.top1(-np.eye(4), labels) == m.mean_class_accuracy(-np.eye(4), labels) == 0.0
    assert m.top_k(-np.eye(4), labels, 3) == 0.0
    one = m.head_figures(np.array([[0.0, 2.0, 1.0]]), [1], label_names=["a", "b", "c"])
    assert (one.top1, one.mean_class_accuracy, one.top_k) == (1.0, 1.0, 1.0)
    assert one.per_class["a"] == m.GroupFigures(0, None)
    assert one.confusion == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_a_class_never_predicted_and_one_without_clips():
    logits = np.array([[3.0, 0, 1], [3.0, 0, 1], [0.0, 0, 1]])
    report = m.head_figures(logits, [0, 1, 1], label_names=["a", "b", "c"])
    assert report.confusion == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert report.mean_class_accuracy == pytest.approx(0.5)


def test_non_finite_logits_count_as_wrong_and_are_told():
    logits = np.array([[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0], [1.0, 0.0]])
    report = m.head_figures(logits, [1, 0, 0, 0], label_names=["a", "b"])
    assert report.unpredicted == 2
    assert report.top1 == 0.5
    assert report.top_k == 0.5
    assert report.loss is None
    assert np.sum(report.confusion) == 2
    assert np.sum(m.confusion_matrix(np.full((2, 2), np.nan), [0, 1])) == 0


def test_large_logits_do_not_overflow():
    assert m.mean_cross_entropy(np.array([[1e4, 0.0]], dtype=np.float32), [1]) == pytest.approx(1e4)
