"""NEL against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import compare, make, pinned_features
from reference_nel import NELReference

from mbcd_cli.methods.nel import mean_shift, spectral_negative_entropy, view_agreement
from mbcd_cli.methods.parts import unit_rows


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    compare(NELReference, "nel", {"hidden": 7}, modalities=modalities, sources=sources, average={"kind": "sma"})


def test_other_settings_and_another_chassis():
    told = {"hidden": 7, "neighbours": 40, "agreement": 0.4, "contrast": 0.9, "flatness": 1.5, "scale": 1.0}
    told |= {"agreement_temperature": 0.5, "temperature": 0.3, "unimodal": "joint"}
    compare(NELReference, "nel", told, modalities=3, norm="none", unimodal_head="linear")


def test_pinned_numbers():
    h = pinned_features(0)
    rows = unit_rows(torch.cat([h, h * torch.linspace(0.5, 1.5, 8, dtype=torch.float64)]))
    shifted = mean_shift(rows, 3)
    woven = torch.stack([shifted[:6], shifted[6:]], dim=1).flatten(0, 1)
    fused = torch.cat([pinned_features(k) for k in range(3)], dim=1)
    found = torch.stack([shifted.sum(), view_agreement([woven], 0.25), spectral_negative_entropy(fused)])
    expected = torch.tensor([30.473844152049, 1.326870180330, -0.267738140120], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_a_neighbour_carries_gradient_and_two_rows_have_one():
    rows = unit_rows(torch.tensor([[1.0, 0.2], [0.3, 1.0]], dtype=torch.float64)).requires_grad_()
    mean_shift(rows, 8)[0].sum().backward()
    assert rows.grad[1].abs().sum() > 0
    whole = mean_shift(rows, 8)
    torch.testing.assert_close(whole[0], whole[1])


def test_a_flat_spectrum_has_the_least_entropy_term_and_features_of_zero_none():
    assert float(spectral_negative_entropy(torch.eye(5))) == pytest.approx(
        -torch.log(torch.tensor(5.0)).item(), abs=1e-6
    )
    zero = torch.zeros(4, 3, requires_grad=True)
    value = spectral_negative_entropy(zero)
    value.backward()
    assert value == 0
    assert torch.isfinite(zero.grad).all()


def test_one_clip_will_do_for_its_batch_norm():
    assert make("nel", {"hidden": 4})[0].step.method.least_batch == 1
