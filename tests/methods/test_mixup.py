"""Mixup against its plainly written step."""

from __future__ import annotations

import pytest
import torch
from plain import compare, make, small_batch
from reference_mixup import MixupReference
from scipy.stats import beta as beta_distribution

from mbcd_cli.methods.mixup import beta_quantiles


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("at", ["cut", "features"])
def test_step(at, modalities, sources):
    told = {"at": at, "alpha": 1.0}
    compare(MixupReference, "mixup", told, modalities=modalities, sources=sources, average={"kind": "sma"})


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("at", ["cut", "features"])
def test_partners_of_another_domain(at, modalities):
    compare(MixupReference, "mixup-domains", {"at": at, "unimodal": "joint"}, modalities=modalities, norm="none")


def test_a_batch_of_one_domain_is_not_mixed():
    method = make("mixup-domains")[0].step.method
    partner = method.draw(small_batch(0, sources=1))[1]
    assert partner.tolist() == list(range(6))
    batch = small_batch(0)
    assert (batch.domains[method.draw(batch)[1]] != batch.domains).all()


def test_distribution():
    found = beta_quantiles(0.2)
    assert found.mean().item() == pytest.approx(0.5)
    assert found.var().item() == pytest.approx(beta_distribution.var(0.2, 0.2), abs=1e-4)
    assert torch.equal(beta_quantiles(0.0), torch.ones_like(found))
