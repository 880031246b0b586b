"""AGM against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import LABELS, compare, pinned_logits
from reference_agm import AGMReference

from mbcd_cli.methods.agm import coefficients, logit_shares, negative_log_likelihood


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    compare(AGMReference, "agm", modalities=modalities, sources=sources, average={"kind": "sma"})


def test_a_cap_and_another_chassis():
    compare(AGMReference, "agm", {"cap": 0.01, "alpha": 9.0, "unimodal": "joint"}, modalities=3, norm="none")


@pytest.mark.parametrize("modalities", [1, 3])
def test_on_the_update(modalities):
    _, plain = compare(AGMReference, "agm", {"modulate": "update"}, modalities=modalities)
    assert (set(plain.factors.values()) == {1.0}) == (modalities == 1)


def of(*sets):
    """f(S) from pinned logits: (index of L, modalities of S) pairs."""
    return {frozenset(some): pinned_logits(k) for k, *some in sets}


def close(found, *expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_pinned_numbers_of_two():
    parts = logit_shares(of((0, 0), (1, 1), (3, 0, 1)), 2)
    torch.testing.assert_close(sum(parts), pinned_logits(3))
    alone = torch.stack([negative_log_likelihood(phi, LABELS) for phi in parts])
    close(coefficients(alone, torch.zeros(2).double(), alpha=2.5, cap=10), 0.458327504802, 1.812327064188)
    history = torch.tensor([1.1, 0.9], dtype=torch.float64)
    close(coefficients(alone, history, alpha=2.5, cap=10), 0.291316669620, 3.152256626546)
    close(history + (alone - history) / 3, 1.122033798155, 1.079235433813)


def test_pinned_numbers_of_three():
    parts = logit_shares(of((0, 0), (1, 1), (2, 2), (4, 0, 1), (5, 0, 2), (6, 1, 2), (3, 0, 1, 2)), 3)
    close(torch.stack([phi.abs().sum() for phi in parts]), 9.834399429054, 8.456415317117, 10.564336226954)
    alone = torch.stack([negative_log_likelihood(phi, LABELS) for phi in parts])
    history = torch.tensor([1.2, 1.0, 0.8], dtype=torch.float64)
    close(coefficients(alone, history, alpha=1, cap=7), 0.807075538020, 0.956930820220, 1.414897628262)
