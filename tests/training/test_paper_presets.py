"""The paper's presets hold what the reference step does, point by point (docs/method.md), and the step obeys it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mbcd_cli.data.readers import epic_kitchens
from mbcd_cli.encoders import build_encoder
from mbcd_cli.methods import METHODS, over_defaults
from mbcd_cli.model import MultiModalModel
from mbcd_cli.resolved import resolve, validate

PRESETS = Path(__file__).resolve().parents[2] / "presets"
REFERENCE = {
    "model": {"modalities": ["video", "audio", "flow"], "hidden": 512, "dropout": 0.5},
    "method": {
        "name": "mbcd",
        "unimodal": "joint",
        "dropout": {"strategy": "adaptive", "score": "confidence"},
        "consistency": {"order": "first", "alpha": 1e-4},
        "distillation": {"enabled": True, "weight": 1.0},
        "feature_noise": {"enabled": True, "probability": 0.5},
    },
    "average": {"kind": "ema", "beta": 0.999},
    "optimizer": {"name": "adam", "lr": 1e-4, "weight_decay": 1e-4, "momentum": 0.9},
    "training": {"epochs": 20, "batch_size": 16, "batch_norm": "tracked"},
}


@pytest.mark.parametrize("name", ["epic-kitchens", "hac"])
def test_the_reference_values_are_written_in_the_preset(name):
    written = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    for part, values in REFERENCE.items():
        assert {key: written[part].get(key) for key in values} == values, part
    assert [written["modalities"][m]["encoder"] for m in ("video", "audio", "flow")] == [
        "slowfast-r101",
        "audio-resnet18",
        "slowonly-r50",
    ]
    assert {m["cut"] for m in written["modalities"].values()} == {"layer4"}


def test_views_of_epic_kitchens_are_the_papers():
    settings = resolve(preset="epic-kitchens", environ={}, flags={})
    assert settings.dataset.reader.name == "epic-kitchens"
    assert (settings.dataset.classes, settings.dataset.target_split) == (8, "test")
    video, flow, audio = (settings.modalities[name] for name in ("video", "flow", "audio"))
    assert (video.frames, video.interval, video.short_side, video.crop) == (32, 2, 256, 224)
    assert (flow.frames, flow.interval, flow.mean, flow.std) == (8, 4, 128, 128)
    assert (audio.samples, audio.nperseg, audio.noverlap, audio.mask_bins) == (160_000, 512, 353, 9)
    assert epic_kitchens.VERBS[settings.dataset.classes - 1] == "pour"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_still_means_itself_over_the_preset(method):
    settings = resolve(preset="epic-kitchens", config=None, environ={}, sets=(), method=method, flags={})
    bare = validate(over_defaults(method))
    assert settings.method == bare.method
    assert settings.average == bare.average


def test_what_is_trained_is_layer4_and_heads():
    """55,043,872 parameters with all three modalities and eight classes."""
    settings = resolve(preset="epic-kitchens", config=None, environ={}, sets=(), method=None, flags={})
    tails = {}
    for name in settings.model.modalities:
        _, tails[name] = build_encoder(name, settings.modalities[name]).cut("layer4")
    model = MultiModalModel(tails, settings=settings.model, classes=8)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.dims == {"video": 2304, "audio": 512, "flow": 2048}
    assert trained == 55_043_872
