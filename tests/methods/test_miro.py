"""MIRO against its plainly written step; its oracle stays as it was."""

from __future__ import annotations

import pytest
import torch
from plain import compare, make, small_batch
from reference_miro import MIROReference
from torch import nn
from torch.nn import functional as F


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    step, plain = compare(
        MIROReference, "miro", {"weight": 0.5}, modalities=modalities, sources=sources, average={"kind": "sma"}
    )
    for name, value in step.method.oracle.named_parameters():
        assert torch.equal(value, plain.oracle[f"student.tails.{name}"])


def test_other_settings_and_another_chassis():
    told = {"weight": 2.0, "variance": 0.4, "speed": 1.0, "unimodal": "joint"}
    step, _ = compare(MIROReference, "miro", told, modalities=3, norm="none", steps=1)
    start = F.softplus(make("miro", told)[0].step.method.raw["video"]) + 1e-5
    torch.testing.assert_close(start, torch.full_like(start, 0.4), rtol=0, atol=1e-7)
    assert step.method.raw["video"].grad.any()


def test_the_oracle_is_in_eval_mode_whatever_trains():
    step = make("miro")[0].step
    step.method.oracle["video"].layer.add_module("norm", nn.BatchNorm1d(6).double())
    step(small_batch(0))
    assert step.method.least_batch == 1
    assert step.method.training
    assert not step.method.oracle["video"].layer.norm.training
    assert step.method.oracle["video"].layer.norm.num_batches_tracked == 0
