"""Encoders of the registry through the checks of `mbcd check encoder`, and encoders that fail them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mbcd_cli import encoders
from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.encoders import ENCODERS, EncoderEntry
from mbcd_cli.encoders.encoder_checks import encoder_checks
from mbcd_cli.encoders.staged import GlobalPool, StagedEncoder
from mbcd_cli.errors import SettingsError

SMALL = {"frames": 4, "short_side": 24, "crop": 20}
SOUND = {"samples": 4000, "nperseg": 128, "noverlap": 64}
OURS = {
    "small-video": VideoModality(width=2, **SMALL),
    "small-flow": FlowModality(width=2, **SMALL),
    "small-audio": AudioModality(width=2, **SOUND),
    "audio-resnet18": AudioModality(encoder="audio-resnet18", **SOUND),
    "array-mlp": ArrayModality(width=4, dimension=7),
    "array-conv": ArrayModality(encoder="array-conv", width=4, dimension=7, length=12),
}
PAPER = {
    "slowfast-r101": VideoModality(encoder="slowfast-r101", **SMALL | {"frames": 32}),
    "slowonly-r50": FlowModality(encoder="slowonly-r50", **SMALL | {"frames": 8}),
    "efficientnet-lite0": VideoModality(encoder="efficientnet-lite0", **SMALL),
}
CHECKS = [*encoder_checks(OURS["array-mlp"])]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", OURS)
def test_small_encoders(name, check):
    encoder_checks(OURS[name])[check]()


@pytest.mark.parametrize("name", PAPER)
def test_large_ones_in_what_needs_no_computing(name):
    encoder_checks(PAPER[name])["stages"]()  # tests of their own compare cuts


def test_none_is_forgotten():
    assert {*OURS, *PAPER} == {*ENCODERS}


class Centred(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, x):
        return x - x.mean(0)


class Idle(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        return x.flatten(1)[:, :, None]


class Forgetful(nn.Module):
    """Keeps weights where no state dict finds them."""

    def __init__(self):
        super().__init__()
        self.weights = [torch.randn(7)]

    def forward(self, x):
        return x * self.weights[0].to(x.device)


class Noisy(nn.Module):
    """Draws in eval mode too."""

    def forward(self, x):
        return x + torch.rand(1)


class Guessing(nn.Module):
    """Drops a value where it can see values."""

    def forward(self, x):
        return x if x.is_meta else x[:, 1:]


def made(*stages: nn.Module, first: nn.Module | None = None, dim: int = 7, last: str = "pool") -> StagedEncoder:
    middle = {f"layer{k}": stage for k, stage in enumerate(stages)}
    return StagedEncoder({"input": first or nn.Identity(), **middle, last: nn.Identity()}, dim=dim)


FAULTS = {
    "pool": ("stages", lambda: made(last="mean")),
    "weights in the input": ("stages", lambda: made(first=nn.Linear(7, 7))),
    "another dimension": ("features", lambda: made(dim=8)),
    "not a number": ("features", lambda: made(nn.Threshold(1e9, float("nan")))),
    "draws": ("cut", lambda: made(Noisy())),
    "clips meet": ("alone", lambda: made(Centred())),
    "another shape where nothing is computed": ("shapes", lambda: made(Guessing())),
    "an idle layer": (
        "training",
        lambda: StagedEncoder({"input": nn.Identity(), "l": Idle(), "pool": GlobalPool()}, dim=7),
    ),
    "weights apart": ("stored", lambda: made(Forgetful())),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_found(fault, monkeypatch):
    check, make = FAULTS[fault]
    monkeypatch.setitem(ENCODERS, "faulty", EncoderEntry("array", lambda settings: make(), "wrong"))
    with pytest.raises((AssertionError, RuntimeError)):
        encoder_checks(ArrayModality(encoder="faulty", dimension=7))[check]()


def test_an_encoder_of_a_package_is_named_where_it_is_misspelt_and_told_which_setting_it_lacks(monkeypatch):
    theirs = EncoderEntry("array", lambda settings: nn.Linear(settings.dimension, 8), "theirs")
    monkeypatch.setattr(encoders, "plugins", lambda group: {"gated": None})
    with pytest.raises(SettingsError) as caught:
        encoders.build_encoder("look", ArrayModality(encoder="gatd", dimension=7))
    assert "Did you mean gated?" in caught.value.remedy
    monkeypatch.setattr(encoders, "entry_of", lambda *_: theirs)
    with pytest.raises(SettingsError, match="dimension of an array modality is not known"):
        encoders.build_encoder("look", ArrayModality(encoder="gated"))
