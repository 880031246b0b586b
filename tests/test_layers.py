"""Layers that round alike in populations compute what torch's own do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mbcd_cli.layers import Dropout, product, rounding_alike

B, D = 7, 5


def pair():
    """torch's layers, and ours in their places."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, 3, bias=False)).double()
    ours = copy.deepcopy(theirs)
    rounding_alike(ours)
    assert type(ours[0]) is not nn.Linear
    assert type(ours[1]) is not nn.BatchNorm1d
    return theirs, ours


@pytest.mark.parametrize("training", [True, False])
def test_they_compute_what_torchs_do(training):
    theirs, ours = pair()
    for seed in range(3):
        x = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = []
        for model in (theirs.train(training), ours.train(training)):
            rows = x.clone().requires_grad_()
            out = model(rows)
            model.zero_grad()
            out.square().sum().backward()
            found.append([out, rows.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


def test_a_batch_norm_refuses_one_row():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        pair()[1].train()(torch.randn(1, D, dtype=torch.float64))


def test_dropout_drops_what_torchs_does():
    theirs, ours = nn.Dropout(0.4), nn.Sequential(nn.Dropout(0.4))
    rounding_alike(ours)
    assert isinstance(ours[0], Dropout)
    x = torch.randn(B, D)
    torch.manual_seed(1)
    expected = theirs(x)
    torch.manual_seed(1)
    assert torch.equal(ours(x), expected)
    assert torch.equal(ours.eval()(x), x)


def test_a_product_is_one():
    a, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(product(a, b), a @ b, rtol=0, atol=1e-13)
