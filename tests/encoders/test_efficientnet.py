"""EfficientNet-Lite0: TensorFlow's padding, frames one by one, and the published names."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.efficientnet import SameConv2d
from mbcd_cli.encoders.pretrained import load_pretrained


def lite0(cut: str = "pool"):
    torch.manual_seed(0)
    settings = VideoModality(encoder="efficientnet-lite0", cut=cut, short_side=32, crop=32)
    return build_encoder("video", settings).eval()


@pytest.mark.parametrize(("size", "kernel", "stride"), [(16, 3, 2), (15, 5, 2), (7, 5, 1)])
def test_padding_is_that_of_tensorflow(size, kernel, stride):
    # "SAME": ceil(size / stride) places; the padding that is left over stands behind.
    convolution = SameConv2d(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, size, size)
    places = -(-size // stride)
    wide = F.pad(x, (kernel, kernel, kernel, kernel))
    room = max((places - 1) * stride + kernel - size, 0)
    start = kernel - room // 2
    expected = torch.stack(
        [
            torch.stack(
                [
                    (
                        wide[0, 0, start + i * stride :, start + j * stride :][:kernel, :kernel]
                        * convolution.weight[0, 0]
                    ).sum()
                    for j in range(places)
                ]
            )
            for i in range(places)
        ]
    )
    torch.testing.assert_close(convolution(x)[0, 0], expected)


def test_trunk_and_tail_are_the_whole_and_frames_do_not_meet():
    frames = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    encoder = lite0()
    with torch.no_grad():
        whole = encoder((frames,))
        for cut in ("block0", "block8", "head", "pool"):
            trunk, tail = encoder.cut(cut)
            assert torch.equal(tail(trunk((frames,))), whole)
        alone = [encoder((frames[:, :, t : t + 1],)) for t in range(3)]
    torch.testing.assert_close(torch.stack(alone).mean(0), whole, rtol=1e-4, atol=1e-6)
    assert whole.shape == (2, 1280)


def test_published_names_load(tmp_path):
    encoder = lite0()
    public = {}
    for key, value in encoder.stages.state_dict().items():
        stage, _, rest = key.partition(".")
        number, _, name = rest.partition(".")
        convolution, norm = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}.get(stage, ("", ""))
        named = (
            f"_blocks.{stage[5:]}._{name}"
            if stage.startswith("block")
            else f"{(convolution, norm)[int(number)]}.{name}"
        )
        public[named] = value + 1
    torch.save(public | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}, tmp_path / "lite0.pth")
    load_pretrained(encoder, "efficientnet-lite0", tmp_path / "lite0.pth")
    state = encoder.stages.state_dict()
    assert torch.equal(state["block3.0.depthwise_conv.weight"], public["_blocks.3._depthwise_conv.weight"])
    assert torch.equal(state["head.1.running_var"], public["_bn1.running_var"])
