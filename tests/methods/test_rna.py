"""RNA-Net against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import compare, pinned_features
from reference_rna import RNAReference

from mbcd_cli.methods.rna import mean_norms, norm_alignment


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    compare(RNAReference, "rna-net", modalities=modalities, sources=sources, norm="none", average={"kind": "sma"})


def test_under_a_layer_norm_it_reads_what_comes_before():
    compare(RNAReference, "rna-net", {"weight": 0.3, "unimodal": "joint"}, modalities=3)


def test_pinned_numbers():
    norms = mean_norms({str(k): pinned_features(k) for k in range(3)})
    for count, value in ((2, 0.010863534643), (3, 0.128917775411)):
        expected = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(norm_alignment(norms[:count]), expected, rtol=0, atol=1e-12)
