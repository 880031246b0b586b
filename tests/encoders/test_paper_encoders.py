"""The paper's encoders: published sizes, the trained part, shapes at the cut, an independent ResNet-18."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.encoders import build_encoder
from mbcd_cli.model import MultiModalModel
from mbcd_cli.settings import ModelSettings

PAPER = {
    "video": VideoModality(encoder="slowfast-r101", cut="layer4"),
    "audio": AudioModality(encoder="audio-resnet18", cut="layer4"),
    "flow": FlowModality(encoder="slowonly-r50", cut="layer4"),
}
SMALL_INPUT = {"video": (2, 3, 8, 32, 32), "audio": (2, 1, 65, 65), "flow": (2, 2, 4, 32, 32)}


@pytest.fixture(scope="module")
def encoders():
    torch.manual_seed(0)
    return {name: build_encoder(name, settings) for name, settings in PAPER.items()}


def decoded(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "audio":
        return torch.randn(SMALL_INPUT[name], generator=generator)
    return torch.randint(0, 256, SMALL_INPUT[name], generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "keys", "parameters", "dim"),
    [("video", 1252, 61_990_312, 2304), ("flow", 318, 31_631_360, 2048), ("audio", 120, 11_170_240, 512)],
)
def test_sizes_are_the_published_ones(encoders, name, keys, parameters, dim):
    assert len(encoders[name].state_dict()) == keys
    assert sum(p.numel() for p in encoders[name].parameters()) == parameters
    assert encoders[name].dim == dim


def test_trained_parameters_with_all_three_modalities():
    torch.manual_seed(0)
    tails = {name: build_encoder(name, settings).cut("layer4")[1] for name, settings in PAPER.items()}
    model = MultiModalModel(tails, settings=ModelSettings(), classes=8)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 55_043_872
    assert model.fused_head[0].in_features == 2304 + 2048 + 512
    parts = {n.split(".")[2] for n in trained if n.startswith("tails.")}
    assert parts == {"layer4"}


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("video", (1, 3, 32, 224, 224), [(1024, 8, 14, 14), (128, 32, 14, 14)]),
        ("flow", (1, 2, 8, 224, 224), [(1024, 8, 14, 14)]),
        ("flow", (1, 2, 8, 256, 256), [(1024, 8, 16, 16)]),
        ("audio", (1, 1, 257, 1004), [(256, 17, 63)]),
    ],
)
def test_tensors_at_the_cut_have_the_papers_shapes(name, size, expected):
    with torch.device("meta"):
        trunk, tail = build_encoder(name, PAPER[name]).cut("layer4")
        parts = trunk((torch.zeros(size),))
        assert [tuple(part.shape[1:]) for part in parts] == expected
        assert tuple(tail(parts).shape) == (1, tail.dim)


@pytest.mark.parametrize(
    ("name", "size", "trunk_gflop", "layer4_gflop", "nbytes"),
    [
        ("video", (1, 3, 32, 224, 224), 170.3, 22.4, 3_211_264 + 1_605_632),
        ("flow", (1, 2, 8, 224, 224), 63.3, 19.5, 3_211_264),
        ("audio", (1, 1, 257, 1004), 14.1, 4.8, 548_352),
    ],
)
def test_cost_per_clip_is_method_mds(name, size, trunk_gflop, layer4_gflop, nbytes):
    """2 x multiply-adds, and float16 bytes at the cut (171.0 with the lateral 0.7)."""
    with torch.device("meta"):
        trunk, tail = build_encoder(name, PAPER[name]).cut("layer4")
        with FlopCounterMode(display=False) as before:
            parts = trunk((torch.zeros(size),))
        lateral = 0
        with FlopCounterMode(display=False) as after:
            tail(parts)
        if tail.frozen:
            with FlopCounterMode(display=False) as recomputed:
                tail.lateral4(parts)
            lateral = recomputed.get_total_flops()
            assert round(lateral / 1e9, 1) == 0.7
    assert round(before.get_total_flops() / 1e9, 1) == trunk_gflop
    assert round((after.get_total_flops() - lateral) / 1e9, 1) == layer4_gflop
    assert sum(part.numel() * 2 for part in parts) == nbytes


@pytest.mark.parametrize("name", list(PAPER))
def test_trunk_then_tail_is_the_whole_encoder_at_every_cut(encoders, name):
    encoder = encoders[name].eval()
    x = decoded(name)
    with torch.no_grad():
        whole = encoder((x,))
        for cut in ("layer3", "layer4", "pool") if name == "video" else ("input", "layer1", "layer4", "pool"):
            trunk, tail = encoder.cut(cut)
            assert torch.equal(tail.eval()(trunk((x,))), whole), cut
    assert torch.isfinite(whole).all()
    assert not torch.equal(whole[0], whole[1])


def test_slow_path_sees_every_fourth_frame(encoders):
    frames = torch.arange(32, dtype=torch.uint8).reshape(1, 1, 32, 1, 1).expand(1, 3, 32, 4, 4)
    slow, fast = encoders["video"].stages["input"](frames)
    settings = PAPER["video"]
    back = slow[0, 0, :, 0, 0] * settings.std[0] + settings.mean[0]
    assert torch.allclose(back, torch.arange(0, 32, 4).float(), atol=1e-4)
    assert fast.shape[2] == 32


def test_pooled_fast_features_come_first(encoders):
    slow, fast = torch.full((1, 2048, 2, 1, 1), 2.0), torch.full((1, 256, 8, 1, 1), 1.0)
    pooled = encoders["video"].stages["pool"]((slow, fast))
    assert pooled[0, :256].eq(1).all()
    assert pooled[0, 256:].eq(2).all()


def test_a_live_trunk_holds_the_lateral_connection():
    """Its batch norm follows train mode with the rest of what is frozen."""
    with torch.device("meta"):
        encoder = build_encoder("video", PAPER["video"])
    trunk, tail = encoder.cut("layer4", live=True)
    assert (trunk.names[-1], tail.names, tail.frozen) == ("lateral4", ("layer4", "pool"), ())
    model = MultiModalModel({"video": tail}, settings=ModelSettings(), classes=8, trunks={"video": trunk}).train()
    assert all(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.trunks.parameters())


def test_lateral_connection_in_the_tail_stays_frozen():
    torch.manual_seed(0)
    _, tail = build_encoder("video", PAPER["video"]).cut("layer4")
    assert tail.names[0] == "lateral4"
    tail.train()
    assert tail.layer4.training
    assert not tail.lateral4.training
    parts = (torch.randn(2, 1024, 2, 2, 2), torch.randn(2, 128, 8, 2, 2))
    before = tail.lateral4.conv.weight.clone()
    tail(parts).square().sum().backward()
    assert tail.lateral4.conv.weight.grad is None
    assert tail.layer4.slow[0].conv1.conv.weight.grad.abs().sum() > 0
    assert torch.equal(tail.lateral4.conv.weight, before)


def test_feature_noise_sees_the_lateral_channels_and_never_the_cached_parts():
    torch.manual_seed(0)
    _, tail = build_encoder("video", PAPER["video"]).cut("layer4")
    seen: list[list[int]] = []

    def noise(parts):
        seen.append([part.shape[1] for part in parts])
        return parts

    with torch.no_grad():
        tail.eval()((torch.randn(2, 1024, 2, 2, 2), torch.randn(2, 128, 8, 2, 2)), noise)
    assert seen == [[1024 + 256, 128], [2048, 256]]


def plain_resnet18(state: dict[str, torch.Tensor], x: torch.Tensor, *, train: bool) -> dict[str, torch.Tensor]:
    """ResNet-18 with a one-channel first convolution, written from the paper's table as plain functions."""

    def norm(x, name):
        return F.batch_norm(
            x,
            state[f"{name}.running_mean"].clone(),
            state[f"{name}.running_var"].clone(),
            state[f"{name}.weight"],
            state[f"{name}.bias"],
            training=train,
        )

    x = norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), "bn1")
    x = F.max_pool2d(F.relu(x), 3, 2, 1)
    out = {"stem": x}
    for layer in range(1, 5):
        for block in range(2):
            name = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(F.relu(norm(y, f"{name}.bn1")), state[f"{name}.conv2.weight"], padding=1)
            y = norm(y, f"{name}.bn2")
            if stride == 2:
                shortcut = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2)
                x = norm(shortcut, f"{name}.downsample.1")
            x = F.relu(x + y)
        out[f"layer{layer}"] = x
    out["pool"] = x.mean(dim=(2, 3))
    return out


@pytest.mark.parametrize("train", [False, True])
def test_audio_network_equals_a_plain_resnet18(tmp_path, train):
    from mbcd_cli.encoders.pretrained import load_pretrained

    torch.manual_seed(3)
    source = build_encoder("audio", PAPER["audio"])
    state = {}
    for key, tensor in source.stages.state_dict().items():
        name = key.removeprefix("stem.")
        state[name] = torch.rand_like(tensor) + 0.5 if "running_var" in key else tensor
        if "running_mean" in key or ("bn" in key.split(".")[-2] and key.endswith("bias")):
            state[name] = torch.randn_like(tensor)
    file = tmp_path / "H.pth.tar"
    torch.save({"model_state_dict": {f"audnet.{k}": v for k, v in state.items()}}, file)
    encoder = build_encoder("audio", PAPER["audio"])
    load_pretrained(encoder, "audio-resnet18", file)
    x = decoded("audio")
    expected = plain_resnet18(
        {k: v.double() if v.is_floating_point() else v for k, v in state.items()}, x.double(), train=train
    )
    encoder.train(train)
    with torch.no_grad():
        for name, stage in encoder.stages.items():
            x = stage(x)
            if name in expected:
                error = (x.double() - expected[name]).abs().max() / expected[name].abs().max()
                assert error < 1e-5, name
