"""Small and array encoders: the cut changes nothing, shapes and the adapter are what the docs say."""

from __future__ import annotations

import pytest
import torch

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.encoders import ENCODERS, build_encoder
from mbcd_cli.encoders.staged import TOGETHER
from mbcd_cli.errors import SettingsError

CASES = {
    "video": (VideoModality(width=4), lambda: torch.randint(0, 256, (3, 3, 8, 32, 32), dtype=torch.uint8)),
    "flow": (FlowModality(width=4), lambda: torch.randint(0, 256, (3, 2, 8, 32, 32), dtype=torch.uint8)),
    "audio": (AudioModality(width=4), lambda: torch.randn(3, 1, 65, 40)),
    "vector": (ArrayModality(width=4, dimension=7), lambda: torch.randn(3, 7)),
    "sequence": (
        ArrayModality(width=4, dimension=7, length=12, encoder="array-conv"),
        lambda: torch.randn(3, 12, 7),
    ),
}


def test_trunk_stays_in_eval_mode_and_its_features_do_not_depend_on_the_batch():
    settings, make = CASES["video"]
    trunk, _ = build_encoder("video", settings).cut("layer3")
    parts = make()
    trunk.train()
    assert not any(module.training for module in trunk.modules())
    torch.testing.assert_close(trunk((parts,))[0][:1], trunk((parts[:1],))[0])


def test_a_live_trunk_follows_train_mode_and_takes_its_time_in_eval_mode():
    settings, _ = CASES["video"]
    trunk, tail = build_encoder("video", settings).cut("layer3", live=True)
    parts = torch.randint(0, 256, (2 * TOGETHER + 1, 3, 4, 8, 8), dtype=torch.uint8)
    trunk.train()
    assert all(module.training for module in trunk.modules())
    seen = []
    trunk.input.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    ((batch,), (twice,)) = trunk((parts,)), trunk((parts,))
    assert torch.equal(batch, twice)
    trunk.eval()
    (alone,) = trunk((parts,))
    assert seen == [len(parts)] * 2 + [TOGETHER, TOGETHER, 1]
    assert not torch.allclose(batch, alone)
    torch.testing.assert_close(alone[-1:], trunk((parts[-1:],))[0])
    assert not any(p.requires_grad for p in trunk.parameters())
    assert tail.frozen == ()


def test_adapter_begins_as_the_identity_and_is_all_that_trains():
    settings, make = CASES["video"]
    plain = build_encoder("video", settings)
    torch.manual_seed(3)
    encoder = build_encoder("video", settings.model_copy(update={"cut": "adapter"})).eval()
    trunk, tail = encoder.cut("adapter")
    parts = (make(),)
    assert torch.equal(tail(trunk(parts)), trunk(parts)[0])
    assert {name.split(".")[0] for name, _ in tail.named_parameters()} == {"adapter"}
    assert encoder.dim == plain.dim


def test_noise_is_applied_where_features_enter_the_tail_and_before_pooling():
    settings, make = CASES["video"]
    encoder = build_encoder("video", settings).eval()
    for cut, expected in (("input", 2), ("layer3", 2), ("pool", 1)):
        seen = []
        trunk, tail = encoder.cut(cut)
        tail(trunk((make(),)), noise=lambda parts, seen=seen: seen.append(parts[0].shape) or parts)
        assert len(seen) == expected
        assert all(len(shape) == 5 for shape in seen)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (VideoModality(cut="layer9"), "no stage 'layer9'"),
        (VideoModality(encoder="resnet"), "no encoder 'resnet'"),
        (VideoModality(encoder="small-audio"), "reads audio"),
        (ArrayModality(encoder="array-conv", dimension=3), "reads sequences"),
        (ArrayModality(), "dimension"),
    ],
)
def test_wrong_settings_are_one_clear_message(settings, words):
    with pytest.raises(SettingsError, match=words):
        build_encoder("m", settings)


def test_registry_kinds_are_those_of_the_settings():
    assert {entry.kind for entry in ENCODERS.values()} == {"video", "flow", "audio", "array"}
