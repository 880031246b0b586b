"""`timm:NAME`: tiny models of timm, ours against their owner's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import owners
import pytest
import torch

from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.encoders import build_encoder, described_encoders, format_of
from mbcd_cli.encoders.formats import import_optional
from mbcd_cli.errors import CheckpointError
from mbcd_cli.settings import CacheSettings, Settings


@pytest.fixture(autouse=True, scope="module")
def there():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    import_optional("timm", "timm")


def described(folder: Path, name: str, **more: object) -> VideoModality:
    modality = VideoModality(encoder=f"timm:{name}", cut="pool", frames=2, **{"weights": "model.safetensors", **more})
    settings = Settings(modalities={"video": modality}, cache=CacheSettings(weights_dir=folder))
    return described_encoders(settings).modalities["video"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("resnet18.a1_in1k", "ImageNet-1k"),
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k", "ImageNet-21k, ImageNet-1k"),
        ("vit_base_patch16_clip_224.laion2b_ft_in12k_in1k", "LAION-2B, ImageNet-12k, ImageNet-1k"),
        ("test_vit.r160_in1k", "ImageNet-1k"),
    ],
)
def test_the_pretraining_is_that_of_the_tag(tmp_path, name, data):
    modality = described(tmp_path, name)
    assert format_of(modality).wants(modality).pretraining == data


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("test_vit", ["patch", "block0", "block5", "pool"]),
        ("test_vit3", ["patch", "block0", "pool"]),  # pools with attention
        ("test_efficientnet", ["patch", "block0", "pool"]),
        ("test_resnet", ["body", "pool"]),
    ],
)
def test_equals_its_owner_and_every_cut_is_the_whole(tmp_path, name, stages):
    owner = owners.timm_model(name, tmp_path / "model.safetensors")
    modality = described(tmp_path, name, frame_pooling="max")
    encoder = build_encoder("video", modality)
    format_of(modality).load(encoder, modality, tmp_path)
    assert {"input", *stages} <= set(encoder.names)
    view = owners.views("video", modality)
    with torch.no_grad():
        ours, theirs = encoder.eval()((view,)), owner(view)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        for cut in encoder.names:
            trunk, tail = encoder.cut(cut)
            assert torch.equal(tail.eval()(trunk((view,))), ours), cut


def test_what_timm_does_not_know(tmp_path):
    with pytest.raises(CheckpointError, match=r"timm: Invalid pretrained tag \(nonsense\) for test_vit"):
        described(tmp_path, "test_vit.nonsense")
    for config, words in (
        ({"architecture": 5}, r"config\.json: architecture: "),
        ({"model_args": {"act_layer": "relu"}}, r"config\.json: .* other settings than timm's test_vit \(act_layer\)"),
        ({"pretrained_cfg": []}, r"config\.json: pretrained_cfg: "),
        ({"pretrained_cfg": {"mean": [0.5], "crop_pct": "x"}}, r"pretrained_cfg\.crop_pct: .*; pretrained_cfg\.mean: "),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=words):
            described(tmp_path, "test_vit")
