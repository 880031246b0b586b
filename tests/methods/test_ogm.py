"""OGM-GE and OGM against their plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import LABELS, compare, pinned_logits
from reference_ogm import OGMReference

from mbcd_cli.methods.modality_dropout import ratios, scores
from mbcd_cli.methods.parts import modulation


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("method", ["ogm-ge", "ogm"])
def test_step(method, modalities, sources):
    compare(OGMReference, method, modalities=modalities, sources=sources, average={"kind": "ema", "beta": 0.8})


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_it_is_modulated_in_a_window_of_epochs(epoch):
    chassis = {"norm": "none", "fused_head": "linear", "unimodal_head": "linear"}
    compare(OGMReference, "ogm-ge", {"start": 2, "stop": 4, "alpha": 0.3}, epoch=epoch, steps=2, **chassis)


def test_a_linear_fused_head_tells_what_each_modality_says():
    _, plain = compare(OGMReference, "ogm", {"modulate": "update"}, modalities=3, fused_head="linear")
    assert min(plain.factors.values()) < 1


@pytest.mark.parametrize("method", ["ogm-ge", "ogm"])
def test_on_the_update(method):
    _, plain = compare(OGMReference, method, {"modulate": "update"}, modalities=3)
    assert min(plain.factors.values()) < 1


def test_pinned_numbers():
    rho = ratios(scores([pinned_logits(0), pinned_logits(1)], LABELS, score="true_class"))
    expected = torch.tensor([1.047108100351, 0.315418275490, 1.0], dtype=torch.float64)
    found = torch.cat([rho[:1], modulation(rho, 0.8)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
