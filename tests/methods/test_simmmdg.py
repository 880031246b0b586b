"""SimMMDG and its blocks against the plainly written ones and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import CLASSES, LABELS, compare, make, pinned_features, pinned_rows
from reference_simmmdg import SimMMDGReference
from torch import nn

from mbcd_cli.encoders.staged import Tail
from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.parts import halves_apart, row_distance, supervised_contrast, unit_rows
from mbcd_cli.methods.simmmdg import SimMMDG
from mbcd_cli.model import MultiModalModel
from mbcd_cli.processes import ALONE


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    compare(SimMMDGReference, "simmmdg", {"hidden": 7}, modalities=modalities, sources=sources, average={"kind": "sma"})


def test_without_a_norm_and_with_heads_that_train():
    told = {"hidden": 7, "unimodal": "joint", "temperature": 0.3, "distance": 0.1, "contrast": 0.5}
    compare(SimMMDGReference, "simmmdg", told, modalities=3, norm="none", unimodal_head="linear")


def test_pinned_numbers():
    rows = [pinned_rows(k) for k in range(3)]
    contrast = [supervised_contrast(rows[:m], LABELS, temperature=0.1, group=ALONE) for m in (2, 3)]
    found = torch.stack(
        [
            halves_apart({str(k): pinned_features(k) for k in range(3)}),
            *contrast,
            row_distance(unit_rows(pinned_rows(1) + 0.5), unit_rows(pinned_features(0)[:, :4])),
        ]
    )
    expected = torch.tensor([-1.735960489149, 3.674873732260, 4.190511795076, 0.284115898489], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_a_single_feature_has_no_halves():
    training, settings = make("erm", modalities=1)
    model = MultiModalModel(
        {"narrow": Tail({"pool": nn.Linear(7, 1)}, dim=1)}, settings=settings.model, classes=CLASSES
    )
    training.step.context.model = model
    with pytest.raises(SettingsError, match="simmmdg splits features into halves, and narrow has a single one"):
        SimMMDG(SimMMDG.Settings(name="simmmdg"), training.step.context)
