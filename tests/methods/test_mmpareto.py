"""MMPareto against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import compare
from reference_mmpareto import MMParetoReference

from mbcd_cli.methods.mmpareto import pareto_share, pareto_step


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    compare(MMParetoReference, "mmpareto", modalities=modalities, sources=sources, average={"kind": "sma"})


def test_conflicts_on_another_chassis():
    chassis = {"norm": "none", "fused_head": "linear", "unimodal_head": "linear"}
    _, plain = compare(MMParetoReference, "mmpareto", {"gamma": 0.7}, modalities=4, steps=8, **chassis)
    assert plain.conflicts


def test_gamma_on_the_update():
    _, plain = compare(MMParetoReference, "mmpareto", {"modulate": "update"}, modalities=3)
    assert plain.factors == {"video": 1.5, "audio": 1.5, "flow": 1.5}


def tensors(t):
    """G_t[c] = cos(1 + 2t + 5c + t c), as tensors of 2 and 4 entries."""
    c = torch.arange(6.0, dtype=torch.float64)
    return list(torch.cos(1 + 2 * t + 5 * c + t * c).split([2, 4]))


def close(found, *expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)


def test_pinned_numbers():
    share = pareto_share(tensors(0), tensors(1))
    close(torch.stack([share, 1 - share]), 0.494603179609, 0.505396820391)
    close(
        1.5 * torch.cat(pareto_step(tensors(0), tensors(1), share)),
        *(-0.699311464680, 0.043262818276, -1.147358804645, -2.255562948586, -1.257959973234, 0.941493373985),
    )
    share = pareto_share(tensors(2), tensors(3))
    assert share == 0.5
    close(
        1.5 * torch.cat(pareto_step(tensors(2), tensors(3), share)),
        *(1.556346659710, 0.126249068811, 0.683807396780, 2.342492520200, 0.380049277705, -2.488910296205),
    )
