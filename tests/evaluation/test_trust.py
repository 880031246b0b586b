from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from mbcd_cli.evaluation.analyses import trust as t
from mbcd_cli.scoring.predictions import Predictions


def predictions(logits, labels):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    n = len(logits)
    return Predictions(
        labels=torch.as_tensor(labels),
        domains=torch.zeros(n, dtype=torch.int64),
        clips=torch.arange(n),
        fused=logits,
        unimodal={"audio": logits * 2},
    )


def case(seed, clips=300, classes=5, scale=3.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, clips)
    logits = rng.normal(size=(clips, classes))
    logits[np.arange(clips), labels] += 1.0
    return (scale * logits).astype(np.float32), labels


def test_calibration_error_by_plain_loops():
    for seed, bins in ((0, 15), (1, 10), (2, 4)):
        logits, labels = case(seed)
        p = torch.tensor(logits).double().softmax(1).numpy()
        conf, right = p.max(1), p.argmax(1) == labels
        total = 0.0
        for k in range(bins):
            inside = (conf > k / bins) & (conf <= (k + 1) / bins)
            if inside.any():
                total += inside.mean() * abs(conf[inside].mean() - right[inside].mean())
        assert t.calibration_error(t.confidence(logits), right, bins=bins) == pytest.approx(total, rel=1e-9)
    table = t.reliability([0.0, 0.5, 0.5, 1.0], [0, 1, 0, 1], bins=2)
    assert [row.clips for row in table] == [3, 1]
    assert table[0].accuracy == pytest.approx(1 / 3)
    spread = t.reliability([0.1, 0.4, 0.6, 0.9], [0, 1, 1, 1], bins=4)
    assert [row.confidence for row in spread] == [0.1, 0.4, 0.6, 0.9]
    assert [row.accuracy for row in spread] == [0.0, 1.0, 1.0, 1.0]
    assert all(row.low < row.confidence <= row.high for row in spread)
    assert t.reliability([0.9], [1], bins=3)[0].accuracy is None


def test_brier_against_scikit_learn_for_two_classes():
    logits, labels = case(3, classes=2)
    p = torch.tensor(logits).double().softmax(1).numpy()[:, 1]
    assert t.brier(logits, labels) == pytest.approx(2 * brier_score_loss(labels, p), rel=1e-9)


def test_temperature_undoes_a_known_one():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20000, 4)) * 1.5
    p = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    labels = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)  # drawn from the probabilities
    for factor in (0.5, 1.0, 3.0):
        assert t.fit_temperature(true * factor, labels) == pytest.approx(factor, rel=0.03)
    logits, labels = case(4)
    found = t.fit_temperature(logits, labels)
    grid = np.exp(np.linspace(*np.log(t.TEMPERATURES), 4001))
    tensor, truth = torch.tensor(logits).double(), torch.tensor(labels)
    losses = [float(torch.nn.functional.cross_entropy(tensor / g, truth)) for g in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)


def test_temperature_at_the_ends():
    assert t.fit_temperature(np.eye(4) * 3, np.arange(4)) < 0.1
    assert t.fit_temperature(np.full((2, 3), np.nan), [0, 1]) == 1.0
    one = t.fit_temperature(np.array([[1.0, 0.0]]), [1])
    assert one == pytest.approx(t.TEMPERATURES[1], rel=1e-3)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 14), st.integers(0, 10_000))
def test_risk_coverage_is_the_mean_over_orders_of_equal_confidences(clips, seed):
    rng = np.random.default_rng(seed)
    conf, right = rng.integers(0, 4, clips) / 4, rng.integers(0, 2, clips).astype(bool)
    total = np.zeros(clips)
    draws = 400
    for _ in range(draws):
        order = np.lexsort((rng.random(clips), -conf))
        total += np.cumsum(~right[order]) / np.arange(1, clips + 1)
    np.testing.assert_allclose(t.risk_coverage(conf, right), total / draws, atol=0.17)
    assert t.risk_coverage(conf, right)[-1] == pytest.approx(1 - right.mean())
    # Without ties the curve is exact.
    conf = rng.permutation(clips) / clips
    order = np.argsort(-conf)
    np.testing.assert_allclose(t.risk_coverage(conf, right), np.cumsum(~right[order]) / np.arange(1, clips + 1))


def test_aurc_by_hand():
    assert t.aurc([0.9, 0.8, 0.7], [1, 0, 1]) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert t.aurc([0.5] * 4, [1, 1, 0, 0]) == pytest.approx(0.5)
    assert t.aurc([0.3], [1]) == 0.0
    assert t.aurc([0.3, 0.4], [0, 0]) == 1.0


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(0, 10_000))
def test_separation_by_plain_counting(n, m, seed):
    rng = np.random.default_rng(seed)
    positive, negative = rng.integers(0, 8, n) / 8, rng.integers(0, 7, m) / 8
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in positive for b in negative])
    accepted = [
        (negative >= threshold).mean()
        for threshold in {*positive, *negative}
        if 20 * (positive >= threshold).sum() >= 19 * n
    ]
    found = t.separation(positive, negative)
    assert found.auroc == pytest.approx(wins)
    assert found.fpr95 == pytest.approx(min(accepted))
    thresholds = sorted({*positive, *negative}, reverse=True)
    recall = [0.0, *((positive >= x).mean() for x in thresholds)]
    precision = [(positive >= x).sum() / ((positive >= x).sum() + (negative >= x).sum()) for x in thresholds]
    expected = sum((b - a) * p for a, b, p in zip(recall, recall[1:], precision, strict=False))
    assert found.aupr == pytest.approx(expected)


def test_trust_of_a_model_always_right_or_always_wrong_has_no_auroc():
    good, bad = predictions(np.eye(4) * 9, np.arange(4)), predictions(np.eye(4) * 9, (np.arange(4) + 1) % 4)
    right = t.trust_figures({"target": good})
    assert right.temperature == {"fused": 1.0, "audio": 1.0}
    assert not right.temperature_fitted
    assert right.sets["target"]["fused"].auroc is None
    assert right.sets["target"]["fused"].aurc == 0.0
    wrong = t.trust_figures({"source": bad}).sets["source"]["fused"]
    assert (wrong.accuracy, wrong.fpr95, wrong.aurc) == (0.0, None, 1.0)


def test_temperature_comes_from_the_source_alone():
    source, target = predictions(*case(5)), predictions(*case(6, scale=9.0))
    both = t.trust_figures({"source": source, "target": target}, bins=10)
    assert both.temperature == t.trust_figures({"source": source}, bins=10).temperature
    assert both.temperature["audio"] == pytest.approx(2 * both.temperature["fused"], rel=1e-3)
    target_figures = both.sets["target"]["fused"]
    scaled = target.fused.double() / both.temperature["fused"]
    assert target_figures.scaled.loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(scaled, target.labels)), rel=1e-6
    )
    source_figures = both.sets["source"]["fused"]
    assert source_figures.scaled.ece < source_figures.ece
    assert sum(row.clips for row in source_figures.reliability) == len(source)
    assert source_figures.risk.coverage[-1] == 1.0
    assert source_figures.risk.risk[-1] == pytest.approx(1 - source_figures.accuracy)


def test_non_finite_outputs_are_never_trusted():
    logits = np.array([[5.0, 0.0], [np.nan, 0.0], [0.0, 2.0]])
    assert t.confidence(logits)[1] == 0.0
    figures = t.trust_figures({"source": predictions(logits, [0, 0, 0])}).sets["source"]["fused"]
    assert figures.accuracy == pytest.approx(1 / 3)
    assert figures.loss is None
    assert figures.scaled.loss is None


def test_out_of_distribution_scores():
    rng = np.random.default_rng(0)
    inside = predictions(np.eye(5)[rng.integers(0, 5, 200)] * 6 + rng.normal(size=(200, 5)), np.zeros(200, int))
    outside = predictions(rng.normal(size=(150, 5)), np.zeros(150, int))
    found = t.out_of_distribution(inside, outside)
    assert set(found) == {"max softmax", "max logit", "energy"}
    energy_in, energy_out = (p.fused.double().exp().sum(1).log().numpy() for p in (inside, outside))
    wins = np.mean(energy_in[:, None] > energy_out[None])
    assert found["energy"].auroc == pytest.approx(wins)
    assert all(v.auroc > 0.9 for v in found.values())
    same = t.out_of_distribution(inside, inside)
    assert same["energy"].auroc == pytest.approx(0.5)
    assert math.isfinite(t.ood_scores(np.array([[np.inf, 0.0]]))["energy"][0])
