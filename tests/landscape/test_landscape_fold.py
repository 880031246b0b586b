from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mbcd_cli.landscape.fold import fold_batch_norms


def network(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        net, x = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(9, 5)
    elif kind == "conv2d":
        net, x = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(3, 2, 6, 6)
    else:
        net, x = nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.Sigmoid()), torch.randn(3, 2, 4, 6, 6)
    net, x = net.double(), x.double()
    norm = net[1]
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(4))
        norm.running_var.copy_(torch.rand(4) + 0.1)
    return net.eval(), x


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv3d"])
def test_same_function_gradient_and_curvature(kind):
    net, x = network(kind)
    folded = copy.deepcopy(net)
    assert fold_batch_norms(folded, lambda: folded(x)) == 1
    torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    away = {n: torch.randn_like(p) for n, p in parameters.items()}

    def loss(model):
        return lambda p: functional_call(model, p, (x,)).pow(3).mean()

    for model in (net, folded):
        model.products = torch.func.jvp(torch.func.grad(loss(model)), (parameters,), (away,))
    torch.testing.assert_close(folded.products, net.products, rtol=1e-9, atol=1e-10)


def test_train_mode_works_as_before():
    net, x = network("conv2d")
    folded = copy.deepcopy(net)
    fold_batch_norms(folded, lambda: folded(x))
    torch.testing.assert_close(folded.train()(x), net.train()(x))
    torch.testing.assert_close(folded[1].running_mean, net[1].running_mean)


def test_only_private_pairs_are_folded():
    class Shared(nn.Module):
        """The convolution's output goes to the batch norm and around it."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + self.relu(y)

    net, x = Shared().eval(), torch.randn(2, 2, 3, 3)
    before = net(x)
    assert fold_batch_norms(net, lambda: net(x)) == 0
    assert torch.equal(net(x), before)

    class Hidden(Shared):
        """The same by an addition that is no module."""

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    hidden = Hidden().eval()
    expected = hidden(x)
    assert fold_batch_norms(hidden, lambda: hidden(x)) == 0
    assert torch.equal(hidden(x), expected)
    untracked = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    assert fold_batch_norms(untracked, lambda: untracked(torch.randn(4, 3))) == 0
    twice = nn.Linear(3, 3)
    reused = nn.Sequential(twice, nn.BatchNorm1d(3), twice).eval()
    assert fold_batch_norms(reused, lambda: reused(torch.randn(4, 3))) == 0
