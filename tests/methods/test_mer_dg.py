"""MER-DG against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import compare, pinned_features, pinned_rows
from reference_mer_dg import MERDGReference

from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.mer_dg import marginal, spectral
from mbcd_cli.resolved import resolve


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    compare(MERDGReference, "mer-dg", modalities=modalities, sources=sources, average={"kind": "sma"})


@pytest.mark.parametrize("modalities", [1, 3])
def test_on_projections_with_contrast(modalities):
    told = {"on": "projection", "hidden": 24, "contrast": 3.0, "weight": 0.5, "marginal": 2.0, "spectral": 0.1}
    # Narrower projections have next to no rank, and the reference's own matrix [128, 128] loses ten digits.
    compare(MERDGReference, "mer-dg", told, modalities=modalities, norm="none")


def pinned_k():
    i, c = torch.arange(6.0, dtype=torch.float64)[:, None], torch.arange(4.0, dtype=torch.float64)[None]
    return pinned_features(1) + 0.5 * torch.cos(1 + i * i + 2 * c + i * c)


@pytest.mark.parametrize(
    ("z", "of_marginal", "of_spectral"),
    [
        (pinned_k, 0.244563037116, 1.529676599828),
        (lambda: pinned_features(1), 0.312097878778, 4.297552919335),
        (lambda: pinned_features(0), 0.238884267390, 6.645369052406),
        (lambda: pinned_rows(0), 0.874021970708, 3.182352920686),
    ],
)
def test_pinned_numbers(z, of_marginal, of_spectral):
    assert marginal(z()).item() == pytest.approx(of_marginal, rel=0, abs=1e-11)
    assert spectral(z()).item() == pytest.approx(of_spectral, rel=0, abs=1e-11)


def test_pinned_sum_and_norms_of_gradients():
    z = [pinned_features(k).requires_grad_() for k in range(3)]
    each = [marginal(one) + spectral(one) for one in z]
    assert 3 * sum(each).item() == pytest.approx(52.863481656739, rel=0, abs=1e-10)
    sum(each).backward()
    assert z[1].grad.norm().item() == pytest.approx(0.452834933077, rel=0, abs=1e-9)
    assert z[0].grad.norm().item() == pytest.approx(0.243336867663, rel=0, abs=1e-9)


def test_constant_columns_and_equal_clips_are_finite():
    for z in (torch.ones(6, 4), torch.ones(6, 9), torch.cat([torch.ones(6, 1), torch.randn(6, 3)], dim=1)):
        z = z.double().requires_grad_()
        value = marginal(z) + spectral(z)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(z.grad).all()
    lone = torch.ones(1, 4, requires_grad=True)
    assert (marginal(lone), spectral(lone)) == (0, 0)


def test_wide_features_of_float32_survive():
    """Rows that differ by little: the matrix is far from regular in float32."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 2304, generator=g) + torch.randn(16, 1, generator=g) + 1e-3 * torch.randn(16, 2304, generator=g)
    assert torch.isfinite(spectral(z.double()))


def test_contrast_needs_projections():
    with pytest.raises(SettingsError, match="contrast compares projections"):
        resolve(method="mer-dg", sets=["method.contrast=3"])
