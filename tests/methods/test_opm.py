"""OPM against its plainly written step."""

from __future__ import annotations

import pytest
import torch
from plain import compare
from reference_opm import OPMReference

from mbcd_cli.methods.opm import drop_rates


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("probability", [0.7, 1.0])
def test_step(modalities, sources, probability):
    told = {"start": 0, "probability": probability}
    compare(OPMReference, "opm", told, modalities=modalities, sources=sources, average={"kind": "sma"})


@pytest.mark.parametrize("epoch", [5, 6])
def test_it_begins_after_some_epochs(epoch):
    chassis = {"norm": "none", "fused_head": "linear", "unimodal_head": "linear"}
    compare(OPMReference, "opm", {"probability": 1.0}, epoch=epoch, **chassis)


def test_a_linear_fused_head_tells_what_each_modality_says():
    chassis = {"norm": "none", "fused_head": "linear", "unimodal_head": "linear"}
    compare(OPMReference, "opm", {"start": 0, "probability": 1.0}, modalities=3, **chassis)


def test_no_clip_loses_every_modality():
    removed = []

    class Watched(OPMReference):
        def loss(self, s):
            terms = super().loss(s)
            removed.append(self.removed)
            return terms

    compare(Watched, "opm", {"start": 0, "probability": 1.0, "rate": 1.0, "strength": 1.0}, modalities=3)
    assert removed == [0] * 5


def test_rates():
    rho = torch.tensor([0.5, 1.0, 1.5, 40.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 0.6155292893, 0.75], dtype=torch.float64)
    torch.testing.assert_close(drop_rates(rho, rate=0.5, strength=0.5), expected, rtol=0, atol=1e-10)
    assert drop_rates(rho, rate=0.9, strength=1.0).max() == 1
