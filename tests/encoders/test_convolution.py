"""The quick forms of 3-D convolutions compute what torch's own does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mbcd_cli.encoders.convolution import Conv3d


def plain(layer: Conv3d, x: torch.Tensor) -> torch.Tensor:
    """The convolution as defined, in float64."""
    return F.conv3d(x.double(), layer.weight.double(), None, layer.stride, layer.padding)


def gradients(out: torch.Tensor, layer: Conv3d, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum(), (x, layer.weight))


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((value.double() - expected).norm() / expected.norm()).detach())


CASES = [
    ((1, 1, 1), (1, 1, 1)),
    ((1, 1, 1), (1, 2, 2)),
    ((1, 1, 1), (1, 3, 2)),
    ((3, 1, 1), (1, 1, 1)),
    ((1, 3, 3), (1, 2, 2)),
    ((7, 1, 1), (4, 1, 1)),
]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), CASES)
@pytest.mark.parametrize(("low", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_agrees_with_the_definition(kernel, stride, low, tolerance, last):
    torch.manual_seed(0)
    layer = Conv3d(96, 12, kernel, stride, tuple(k // 2 for k in kernel), bias=False)
    x = torch.randn(2, 96, 4, 3, 3)  # 72 positions, fewer than channels
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = layer(x)
    expected = plain(layer, x)
    assert out.shape == expected.shape
    assert relative(out, expected) < tolerance
    for one, other in zip(gradients(out.float(), layer, x), gradients(expected, layer, x), strict=True):
        assert relative(one, other) < tolerance


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "low", "form"),
    [
        ((3, 1, 1), (1, 1, 1), 3, False, "conv3d dilated"),
        ((1, 1, 1), (1, 1, 1), 3, False, "conv3d dilated"),
        ((1, 1, 1), (1, 2, 2), 3, False, "conv3d"),
        ((1, 3, 3), (1, 1, 1), 3, False, "conv3d"),
        ((1, 1, 1), (1, 2, 2), 3, True, "linear"),
        ((3, 1, 1), (1, 1, 1), 3, True, "linear"),
        ((3, 1, 1), (1, 1, 1), 9, True, "conv3d"),  # more positions than channels
        ((1, 3, 3), (1, 1, 1), 3, True, "conv3d"),
    ],
)
def test_the_form_that_was_measured_to_be_quick_is_taken(monkeypatch, kernel, stride, size, low, form):
    taken = []

    def watch(name, original):
        def call(*args, **options):
            dilated = name == "conv3d" and args[6:] == () and len(args) > 5 and tuple(args[5]) == (1, 2, 2)
            taken.append(name + " dilated" * dilated)
            return original(*args, **options)

        monkeypatch.setattr(F, name, call)

    watch("conv3d", F.conv3d)
    watch("linear", F.linear)
    layer = Conv3d(96, 12, kernel, stride, tuple(k // 2 for k in kernel), bias=False)
    x = torch.randn(2, 96, 4, size, size).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        layer(x)
    assert taken == [form]


@pytest.mark.parametrize(("kernel", "frames"), [((3, 3, 3), 2), ((3, 1, 1), 2), ((5, 1, 1), 3)])
def test_gradients_hold_nothing_that_memory_held(kernel, frames):
    """More taps than frames in bfloat16: oneDNN's own weight gradient is of what memory happens to hold."""
    torch.manual_seed(0)
    layer = Conv3d(16, 16, kernel, 1, tuple(k // 2 for k in kernel), bias=False)
    x = torch.randn(4, 16, frames, 4, 4).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    expected = gradients(plain(layer, x), layer, x)
    for _ in range(3):
        held = [torch.full((2**power,), float("nan"), dtype=torch.bfloat16) for power in range(4, 20)]
        del held
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        for one, other in zip(gradients(out.float(), layer, x), expected, strict=True):
            assert relative(one, other) < 2e-2


def test_float64_and_second_derivatives_pass_through():
    torch.manual_seed(0)
    layer = Conv3d(4, 3, (3, 1, 1), 1, (1, 0, 0), bias=False).double()
    x = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), plain(layer, x))
    layer, x = layer.float(), x.detach().float().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    y = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(plain(layer, y).square().sum(), y, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), y)
    assert relative(second, expected) < 1e-5
