"""Rules of selection on made-up epochs, and label-free estimates, against plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mbcd_cli.evaluation.report.evaluated import Run
from mbcd_cli.evaluation.report.selection import selected, selection_tables, write_selection
from mbcd_cli.scoring.predictions import Predictions
from mbcd_cli.scoring.unlabelled import agreement, said_classes, thresholded_confidence


def run_of(folder: Path, accuracies: list[float], *, best: int, told: list[tuple[float, float]], **more) -> Run:
    """A run whose target accuracies and (agreement, confidence) by epoch these are."""
    folder.mkdir(parents=True)
    records = [
        {
            "epoch": epoch,
            "validation": {"teacher": {"fused": {"accuracy": 0.9}}, "student": {"fused": {"accuracy": 0.5}}},
            "target": {"student": {"fused": {"accuracy": 0.1}}, "teacher": {"fused": {"accuracy": accuracy}}},
            "unlabelled": {"agreement": told[epoch - 1][0], "confidence": told[epoch - 1][1]},
            "best_epoch": best,
        }
        for epoch, accuracy in enumerate(accuracies, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    what = {"dataset": "d", "modalities": ("a", "b"), "method": "mbcd", "target": "x", "sources": ("y", "z"), "seed": 0}
    return Run(path=folder, heads={"fused": 1.0}, in_domain=None, **{**what, **more})


def test_every_rule_chooses_its_epoch(tmp_path):
    told = [(0.5, 0.9), (0.7, 0.9), (0.7, 0.1)]
    run = run_of(tmp_path / "run", [0.2, 0.8, 0.5], best=3, told=told)
    others = [
        run_of(tmp_path / "y", [0.9, 0.1, 0.3], best=1, told=told, target="y", sources=("z",)),
        run_of(tmp_path / "z", [0.1, 0.8, 0.8], best=1, told=told, target="z", sources=("y",)),
    ]
    found = {one.rule: one for one in selected([run], {run.path: others})}
    assert {rule: one.epoch for rule, one in found.items()} == {
        "source validation": 3,
        "leave one source out": 3,  # 1.0, 0.9, 1.1
        "last": 3,
        "agreement": 2,
        "confidence": 1,
        "oracle": 2,
    }
    assert found["confidence"].accuracy == pytest.approx(20)
    assert found["confidence"].regret == pytest.approx(60)
    assert "leave one source out" not in {one.rule for one in selected([run])}
    by_rule, by_method = selection_tables(list(found.values()))
    assert [row[0] for row in by_rule.rows] == list(found)
    assert by_method.columns[1:] == [rule for rule in found if rule != "oracle"]
    lines = write_selection(list(found.values()), tmp_path / "selection.csv").read_text().splitlines()
    assert len(lines) == 7
    assert lines[1].endswith("mbcd,x,0,source validation,3,50.0,30.0")


def test_a_run_without_open_target_has_no_selection(tmp_path):
    run = run_of(tmp_path / "run", [0.2], best=1, told=[(0.1, 0.1)])
    log = tmp_path / "run/metrics.jsonl"
    log.write_text(json.dumps({**json.loads(log.read_text()), "target": None}) + "\n")
    assert selected([run]) == []
    (tmp_path / "run/metrics.jsonl").unlink()
    assert selected([run]) == []
    assert selection_tables([]) == []


def test_estimates_without_labels_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    source, target = (torch.from_numpy(rng.normal(size=(count, 3))) for count in (40, 60))
    labels = torch.from_numpy(rng.integers(3, size=40))
    heads = {name: torch.from_numpy(rng.normal(size=(60, 3))) for name in ("a", "b")}
    none = torch.full((60,), -1)
    said = Predictions(labels=none, domains=none, clips=none, fused=target, unimodal=heads)
    pairs = [(target, heads["a"]), (target, heads["b"]), (heads["a"], heads["b"])]
    same = [int(one[i].argmax() == other[i].argmax()) for one, other in pairs for i in range(60)]
    assert agreement(said) == pytest.approx(np.mean(same), abs=1e-12)

    def sure(logits: torch.Tensor) -> list[float]:
        return [max(np.exp(row) / np.exp(row).sum()) for row in logits.numpy()]

    right = np.mean([int(row.argmax() == label) for row, label in zip(source, labels, strict=True)])
    limits = [limit for limit in sure(source) if np.mean(np.array(sure(source)) < limit) == pytest.approx(1 - right)]
    expected = np.mean(np.array(sure(target)) >= limits[0])
    assert thresholded_confidence(source, labels, target) == pytest.approx(expected, abs=1e-12)
    assert thresholded_confidence(source, source.argmin(dim=1), target) == 0.0
    assert thresholded_confidence(source, source.argmax(dim=1), source) == 1.0


def test_a_clip_without_a_prediction_agrees_with_nothing_and_is_no_class():
    """As everywhere; a diverged model would be the one whose heads agree best."""
    none = torch.zeros(2, dtype=torch.int64)
    logits = torch.tensor([[2.0, 1.0], [float("nan"), 1.0]])
    said = Predictions(labels=none, domains=none, clips=none, fused=logits, unimodal={"a": logits.clone()})
    assert agreement(said) == 0.5
    assert said_classes(said) == {"fused": [0, -1], "unimodal": {"a": [0, -1]}}
    # Right, but not sure: below the one that is.
    assert thresholded_confidence(logits, none, torch.tensor([[1.5, 1.0], [3.0, 1.0]])) == 0.5
