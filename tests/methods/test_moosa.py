"""MOOSA against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import LABELS, compare, make, pinned_logits
from reference_moosa import MOOSAReference

from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.moosa import branch_entropy, drawn_orders, jigsaw_columns, weighted_cross_entropy
from mbcd_cli.processes import ALONE
from mbcd_cli.training.contract import CHECKS
from mbcd_cli.training.subject import Subject


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    told = {"hidden": 7, "permutations": 6, "entropy": 0.1}
    compare(MOOSAReference, "moosa", told, modalities=modalities, sources=sources, average={"kind": "sma"})


def test_the_public_form_and_another_chassis():
    told = {
        "hidden": 7,
        "permutations": 5,
        "parts": 3,
        "weighting": "batch",
        "weighting_temperature": 0.5,
        "masked": 0.7,
    }
    compare(MOOSAReference, "moosa", told, modalities=3, norm="none", unimodal_head="linear")


def test_pinned_numbers():
    branches = [pinned_logits(k) for k in (0, 1, 3)]
    found = [
        weighted_cross_entropy(branches, LABELS, temperature=1.0, per_clip=per_clip, group=ALONE)
        for per_clip in (True, False)
    ]
    expected = torch.tensor([1.868454077182, 1.761858360255, 0.668872430143], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([*found, branch_entropy(branches)]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", ["clip", "batch", "off"])
def test_statistics_of_the_batch_are_those_of_all_processes(weighting):
    torch.set_num_threads(1)
    told = {"hidden": 8, "permutations": 6, "weighting": weighting, "entropy": 0.1}
    CHECKS["processes"](Subject.of("moosa", told))


def test_orders_are_distinct_and_all_where_there_are_few():
    assert len(set(drawn_orders(8, 128))) == 128
    assert sorted(drawn_orders(3, 128)) == drawn_orders(3, 6)
    assert jigsaw_columns([5, 2], 2, [(0, 1, 2, 3), (3, 1, 0, 2)]).tolist() == [[0, 1, 2, 3, 5, 6], [6, 2, 3, 0, 1, 5]]


def test_features_too_narrow_for_the_jigsaw_are_refused():
    with pytest.raises(SettingsError, match="moosa cuts features into 5 parts, and audio has fewer"):
        make("moosa", {"parts": 5, "hidden": 4})
