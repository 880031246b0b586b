"""Our backbones against OpenMMLab's, stage by stage. Needs the group `peer` (`uv sync --group peer`)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.pretrained import load_pretrained

for package in ("mmengine", "mmcv", "mmaction"):
    if importlib.util.find_spec(package) is None:
        pytest.skip("the dependency group `peer` is not installed", allow_module_level=True)

# As in the configurations slowfast_r101_8x8x1_256e_kinetics400_rgb and slowonly_r50_8x8x1_256e_kinetics400_flow.
SLOWFAST = {
    "resample_rate": 4,
    "speed_ratio": 4,
    "channel_ratio": 8,
    "slow_pathway": {
        "type": "resnet3d",
        "depth": 101,
        "pretrained": None,
        "lateral": True,
        "fusion_kernel": 7,
        "conv1_kernel": (1, 7, 7),
        "dilations": (1, 1, 1, 1),
        "conv1_stride_t": 1,
        "pool1_stride_t": 1,
        "inflate": (0, 0, 1, 1),
        "norm_eval": False,
    },
    "fast_pathway": {
        "type": "resnet3d",
        "depth": 101,
        "pretrained": None,
        "lateral": False,
        "base_channels": 8,
        "conv1_kernel": (5, 7, 7),
        "conv1_stride_t": 1,
        "pool1_stride_t": 1,
        "norm_eval": False,
    },
}
SLOWONLY = {
    "depth": 50,
    "pretrained": None,
    "lateral": False,
    "in_channels": 2,
    "with_pool2": False,
    "conv1_kernel": (1, 7, 7),
    "conv1_stride_t": 1,
    "pool1_stride_t": 1,
    "inflate": (0, 0, 1, 1),
    "norm_eval": False,
}


@pytest.fixture(scope="module")
def backbones():
    """The peer's backbones, under empty parent packages: the real ones' __init__ import what mmcv-lite lacks."""
    root = Path(importlib.util.find_spec("mmaction").submodule_search_locations[0])
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mmaction"}
    for name in ("mmaction", "mmaction.models", "mmaction.models.backbones"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    try:
        slowfast = importlib.import_module("mmaction.models.backbones.resnet3d_slowfast")
        slowonly = importlib.import_module("mmaction.models.backbones.resnet3d_slowonly")
        yield {"slowfast-r101": slowfast.ResNet3dSlowFast, "slowonly-r50": slowonly.ResNet3dSlowOnly}
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mmaction"]:
            del sys.modules[name]
        sys.modules.update(kept)


def randomise(module: torch.nn.Module) -> None:
    """Random weights everywhere; batch norms, the zero-initialised last one of a residual branch too, get random
    affine parameters and statistics, near enough to 1 that float32 stays comparable through a hundred layers."""
    generator = torch.Generator().manual_seed(5)
    for part in module.modules():
        if isinstance(part, torch.nn.Conv3d):
            fan_in = part.weight[0].numel()
            part.weight.data.normal_(0, fan_in**-0.5, generator=generator)
        elif isinstance(part, torch.nn.BatchNorm3d):
            part.weight.data.uniform_(0.4, 0.8, generator=generator)
            part.bias.data.normal_(0, 0.2, generator=generator)
            part.running_mean.normal_(0, 0.2, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 1e-3
    return float((ours - theirs).norm() / theirs.norm())


def peer_maps(peer: torch.nn.Module, names: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of the named submodules in one forward pass."""
    maps: dict[str, torch.Tensor] = {}
    hooks = [
        peer.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: maps.__setitem__(name, out.detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        peer(x)
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("encoder_name", "keys", "parameters"),
    [("slowfast-r101", 1252, 61_990_312), ("slowonly-r50", 318, 31_631_360)],
)
def test_feature_maps_of_every_stage_agree(tmp_path, backbones, encoder_name, keys, parameters, train):
    slowfast = encoder_name == "slowfast-r101"
    peer = backbones[encoder_name](**(SLOWFAST if slowfast else SLOWONLY))
    randomise(peer)
    state = peer.state_dict()
    assert len(state) == keys
    assert sum(p.numel() for p in peer.parameters()) == parameters
    file = tmp_path / "published.pth"
    heads = {"cls_head.fc_cls.weight": torch.zeros(400, 8), "cls_head.fc_cls.bias": torch.zeros(400)}
    torch.save({"meta": {}, "state_dict": {f"backbone.{k}": v for k, v in state.items()} | heads}, file)

    modality = (
        VideoModality(encoder=encoder_name, cut="layer4")
        if slowfast
        else FlowModality(encoder=encoder_name, cut="layer4")
    )
    torch.manual_seed(0)
    encoder = build_encoder(modality.kind, modality)
    report = load_pretrained(encoder, encoder_name, file)
    assert report.loaded == keys
    assert report.ignored == tuple(heads)

    shape = (2, 3, 16, 64, 64) if slowfast else (2, 2, 8, 64, 64)
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    normalised = encoder.stages["input"](x)
    layers = [f"layer{i}" for i in range(1, 5)]
    if slowfast:
        laterals = ["conv1_lateral", *(f"layer{i}_lateral" for i in (1, 2, 3))]
        names = [f"{p}_path.{n}" for p in ("slow", "fast") for n in ("maxpool", *layers)]
        names += [f"slow_path.{n}" for n in laterals]
        network_input = normalised[1]
    else:
        names = ["maxpool", *layers]
        network_input = normalised
    peer.train(train)
    encoder.train(train)
    theirs = peer_maps(peer, names, network_input)

    parts = normalised
    compared = 0
    with torch.no_grad():
        for stage in ("stem", *(s for s in encoder.names if s.startswith(("lateral", "layer")))):
            parts = encoder.stages[stage](parts)
            if not slowfast:
                pairs = [(parts, theirs["maxpool" if stage == "stem" else stage])]
            elif stage.startswith("lateral"):
                lateral = theirs[f"slow_path.{laterals[int(stage[-1]) - 1]}"]
                pairs = [(parts[0][:, -lateral.shape[1] :], lateral)]
            else:
                name = "maxpool" if stage == "stem" else stage
                pairs = [(parts[0], theirs[f"slow_path.{name}"]), (parts[1], theirs[f"fast_path.{name}"])]
            for ours, reference in pairs:
                assert relative(ours, reference) < 1e-5, stage
                compared += 1
        pooled = encoder.stages["pool"](parts)
    assert compared == len(names)
    if slowfast:
        means = [theirs[f"{path}_path.layer4"].mean(dim=(2, 3, 4)) for path in ("fast", "slow")]
        expected = torch.cat(means, dim=1)
    else:
        expected = theirs["layer4"].mean(dim=(2, 3, 4))
    assert relative(pooled, expected) < 1e-5
    if train:  # the running statistics moved alike
        ours, unexpected = translate_back(encoder, peer, encoder_name)
        assert not unexpected
        for key, value in encoder.stages.state_dict().items():
            if key.endswith(("running_mean", "running_var")):
                assert relative(value, ours[key]) < 1e-5, key


def translate_back(encoder, peer, encoder_name):
    from mbcd_cli.encoders.pretrained import translate

    return translate(peer.state_dict(), encoder_name)
