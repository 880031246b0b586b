"""ARL against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import LABELS, compare, pinned_logits
from reference_arl import ARLReference

from mbcd_cli.methods.arl import pushes, reliance
from mbcd_cli.methods.parts import cross_entropy, mean_entropies

TOLD = {"gamma": 1.7, "temperature": 5.0, "start": 2}


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    average = {"kind": "sma"}
    compare(ARLReference, "arl", TOLD, modalities=modalities, sources=sources, epoch=2, average=average)


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("modulate", ["gradient", "update"])
def test_before_and_after_its_start_on_another_chassis(epoch, modulate):
    told = TOLD | {"modulate": modulate, "unimodal": "joint"}
    _, plain = compare(ARLReference, "arl", told, modalities=3, epoch=epoch, norm="none", fused_head="linear")
    assert (max(plain.pace) > 1) == (epoch == 2)


def of(*logits):
    """d, q of M times logits."""
    sizes = torch.stack([one.abs().sum(dim=1).mean() for one in logits])
    return sizes / sizes.sum(), reliance(torch.stack(mean_entropies(logits)))


def close(found, *expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)


def test_pinned_numbers():
    d, q = of(pinned_logits(0), pinned_logits(1))
    close(torch.cat([d, q]), 0.477146179162, 0.522853820838, 0.467324664284, 0.532675335716)
    close(pushes(d, q, temperature=8), 0.480367069657, 0.519632930343)
    close(pushes(d, q, temperature=4), 0.490179748133, 0.509820251867)
    d, q = of(3 * pinned_logits(0), pinned_logits(1))
    close(torch.cat([d, q]), 0.732458749781, 0.267541250219, 0.627302701403, 0.372697298597)
    close(pushes(d, q, temperature=8), 0.301271924422, 0.698728075578)
    close(pushes(*of(*map(pinned_logits, range(3))), temperature=8), 0.311018709951, 0.335314622830, 0.353666667220)
    fused, *alone = (cross_entropy(pinned_logits(k), LABELS) for k in (3, 0, 1))
    close((fused + 4 * sum(alone))[None], 15.793267542853)
