"""CGGM against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import LABELS, compare, make, pinned_features, pinned_logits
from reference_cggm import CGGMReference

from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.cggm import balance_of, misalignment

SMOOTH = {"score": "likelihood", "memory": 0.7, "bounded": False, "modulate": "update"}


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    average = {"kind": "sma"}
    compare(CGGMReference, "cggm", modalities=modalities, sources=sources, average=average, steps=8)


@pytest.mark.parametrize("told", [SMOOTH, {"magnitude": False, "direction": 2.0}, {"modulate": "update"}])
def test_its_other_forms_on_another_chassis(told):
    compare(CGGMReference, "cggm", told, modalities=3, norm="none", steps=8)


def test_output_layers_of_unlike_width_are_refused():
    with pytest.raises(SettingsError, match="output layers"):
        make("cggm", unimodal_head="linear")


def accuracies(*numbers):
    right = [pinned_logits(k, classes=4).argmax(dim=1) == LABELS for k in numbers]
    return torch.stack(right).double().mean(dim=1)


def test_pinned_numbers():
    first, second = accuracies(0, 1, 2), accuracies(4, 5, 6)
    one, two = balance_of(first, bounded=False), balance_of(second - first, bounded=False)
    expected = [0.333333346667, 0.666666673333, 1.0, 1.499999985000, 0.500000015000, 0.000000030000]
    found = torch.cat([one, two])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)

    def weight(k, shift):
        i, c = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(6.0, dtype=torch.float64)[None]
        return 1.5 + k + torch.sin(1 + 3 * i + 7 * c + 11 * k) - shift

    assert torch.equal(weight(0, 0), pinned_features(0)[:4, :6])
    value = misalignment(weight(0, 1.5), [weight(k + 1, 2.5 + k) for k in range(3)], two)
    assert float(value) == pytest.approx(0.931097615382, abs=1e-11)
