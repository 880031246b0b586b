"""Passports: an encoder that is fed or read otherwise than its owner does is refused, and the fault named."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import helpers
import pytest
import tomli_w
import torch
from torch import nn

from mbcd_cli.checksums import is_whole
from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.modality_cache import ModalityCache
from mbcd_cli.encoders import build_encoder
from mbcd_cli.errors import CheckpointError, MbcdError, SettingsError
from mbcd_cli.integrity import examine
from mbcd_cli.preparation.identity import differences, passports, read_passport, refuse_other, same_output
from mbcd_cli.preparation.passport import passport_of, probe
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve, validate

FRAMES = {"kind": "video", "axes": "BCTHW", "frames": 4, "size": [12, 12], "colour": "RGB", "values": [0.0, 1.0]}
FRAMES |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "gives": "BD", "pooling": "mean", "dim": 5}
SOUND = {"kind": "audio", "axes": "BS", "sample_rate": 8000, "samples": 400, "values": [-1.0, 1.0], "gives": "BD"}
SOUND |= {"pooling": "mean", "dim": 4}


class Frames(nn.Module):
    """[N, 3, T, H, W] -> [N, 5], other where any axis or channel is mixed up."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv3d(3, 5, (2, 3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.convolution(x)).mean((2, 3, 4))


class Tokens(nn.Module):
    """[N, 3, T, H, W] -> [N, 7, 5]: tokens first, features last."""

    def __init__(self):
        super().__init__()
        self.frames = Frames()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.frames(x).unsqueeze(1)
        return features * torch.arange(1.0, 8.0).reshape(1, 7, 1)


class Sound(nn.Module):
    """[N, S] -> [N, 4]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.convolution = nn.Conv1d(1, 4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.convolution(x.unsqueeze(1))).mean(2)


class Steps(nn.Module):
    """[N, S] -> [N, 4], by an LSTM of two layers and directions on steps of 8 samples."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 2, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x.unflatten(1, [-1, 8]))[0][:, -1]


def script(path: Path, model: nn.Module, wants: dict) -> Path:
    torch.jit.save(torch.jit.script(model.eval()), path)
    path.with_name(f"{path.name}.toml").write_text(tomli_w.dumps(wants))
    return path


def settings_of(folder: Path, name: str = "m.pt", kind: str = "video", **given):
    modality = {"kind": kind, "encoder": f"torchscript:{name}", "cut": "adapter"} | given
    return validate({"modalities": {"m": modality}, "cache": {"weights_dir": folder}})


def refused(folder: Path, *words: str, error: type[MbcdError] = CheckpointError, **given) -> None:
    with pytest.raises(error) as caught:
        passports(settings_of(folder, **given))
    for word in words:
        assert word in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"colour": "BGR"}, "colour: RGB then, BGR now"),
        ({"axes": "BCTWH"}, "axes: BCTHW then, BCTWH now"),
        ({"mean": [0.5, 0.4, 0.5]}, "mean: [0.5, 0.4, 0.3] then, [0.5, 0.4, 0.5] now"),
        ({"values": [0.0, 255.0]}, "values: [0.0, 1.0] then, [0.0, 255.0] now"),
        ({"pooling": "first"}, "pooling: mean then, first now"),
        ({"size": [10, 10]}, "size: [12, 12] then, [10, 10] now"),
        ({"frames": 2}, "frames: 4 then, 2 now"),
    ],
)
def test_what_contradicts_the_recorded_passport_is_named(tmp_path, fault, words):
    file = script(tmp_path / "m.pt", Tokens(), FRAMES | {"gives": "BLD"})
    recorded = passports(settings_of(tmp_path), record=True)["m"]
    assert passports(settings_of(tmp_path))["m"] == recorded == read_passport(file)
    assert is_whole(tmp_path / "m.pt.passport.json")
    script(file, Tokens(), FRAMES | {"gives": "BLD"} | fault)
    refused(tmp_path, words, "m.pt.passport.json")


def test_another_rate_is_named(tmp_path):
    script(tmp_path / "m.pt", Sound(), SOUND)
    passports(settings_of(tmp_path, kind="audio"), record=True)
    refused(tmp_path, "sample_rate is 16000", "wants 8000", kind="audio", sample_rate=16000, error=SettingsError)
    script(tmp_path / "m.pt", Sound(), SOUND | {"sample_rate": 16000})
    refused(tmp_path, "sample_rate: 8000 then, 16000 now", kind="audio")


def test_settings_against_what_it_wants(tmp_path):
    script(tmp_path / "m.pt", Frames(), FRAMES)
    refused(tmp_path, "modalities.m.frames is 2", "wants 4", frames=2, error=SettingsError)
    refused(tmp_path, "modalities.m.crop is 10", "wants 12", crop=10, error=SettingsError)
    refused(tmp_path, "modalities.m.mean", mean=(0.5, 0.4, 0.3), error=SettingsError)
    with pytest.raises(SettingsError) as caught:
        passports(settings_of(tmp_path, frames=2, mean=(0.5, 0.4, 0.3)))
    remedy = [word for word in caught.value.remedy.split() if word.startswith("modalities.")]
    preset = [f"modalities.m.{told}" for told in ("kind=video", "encoder=torchscript:m.pt", "cut=adapter", "frames=2")]
    assert passports(resolve(sets=[*preset, *remedy], flags={"cache.weights_dir": tmp_path}))


class Mixed(nn.Module):
    """An encoder's input, mixed up before it is normalised."""

    def __init__(self, change, inside: nn.Module):
        super().__init__()
        self.change, self.inside = change, inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(self.change(x.float()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.flip(1), "red and blue swapped (BGR)"),
        (lambda x: x.transpose(-1, -2), "its axes H and W swapped"),
        (lambda x: x.flip(2), "its frames in the opposite order"),
        (lambda x: x / 255, "values 255 times as large"),
    ],
)
def test_what_code_mixes_up_is_found_by_the_output(tmp_path, change, words):
    modality = VideoModality(width=2, frames=4, crop=24, short_side=24, cut="adapter")
    torch.manual_seed(0)
    encoder = build_encoder("m", modality)
    before = passport_of(modality, encoder, file=None, sha256=None)
    encoder.stages["input"] = Mixed(change, encoder.stages["input"])
    now = passport_of(modality, encoder, file=None, sha256=None)
    assert differences(before, now) == ["its output on the probe is another"]
    with pytest.raises(CheckpointError) as caught:
        refuse_other(before, now, recorded=tmp_path, modality=modality, encoder=encoder)
    assert f"with {words} it is the recorded one" in str(caught.value)


def test_rounding_is_no_difference():
    modality = VideoModality(width=2, frames=4, crop=24, short_side=24, cut="adapter")
    torch.manual_seed(0)
    encoder = build_encoder("m", modality)
    single = passport_of(modality, encoder, file=None, sha256=None)
    double = passport_of(modality, encoder.double(), file=None, sha256=None)
    assert same_output(single, double)
    assert not differences(single, double)
    encoder.stages["layer1"][0].weight.data *= 1.02
    assert not same_output(single, passport_of(modality, encoder, file=None, sha256=None))


def test_the_probe_has_no_symmetry():
    (view,) = probe(VideoModality(frames=8, crop=32))
    for other in (view[::-1], view[:, ::-1], view.transpose(0, 1, 3, 2), view[..., ::-1], view[:, :, ::-1]):
        assert (other != view).mean() > 0.5
    rates = [probe(AudioModality(sample_rate=rate, front_end="waveform", samples=4000))[0] for rate in (8000, 16000)]
    assert abs(rates[0] - rates[1]).mean() > 0.1
    assert abs(rates[0]).max() <= 1


def weights(path: Path, seed: int = 0, *, trained: bool = True, **changed) -> Path:
    """A state dict of `small-video`."""
    torch.manual_seed(seed)
    state = build_encoder("video", VideoModality(width=2, cut="pool")).stages.state_dict()
    for value in state.values():
        if trained and value.is_floating_point():
            value += 0.1 * torch.rand(value.shape)
    torch.save({key: value for key, value in (state | changed).items() if value is not None}, path)
    return path


def ours(root: Path, cache: Path, *sets: str):
    kept = ["modalities.video.cut=pool", "modalities.video.weights=w.pth", "modalities.video.width=2"]
    kept += ["model.modalities=video", *sets]
    flags = {"dataset.root": root, "cache.dir": cache, "cache.weights_dir": root}
    return resolve(sets=[*helpers.SMALL, *kept], flags=flags)


def test_prepare_records_it_and_refuses_another_file_under_the_same_name(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")
    weights(root / "w.pth")
    folder = Path(prepare(ours(root, tmp_path / "cache")).modalities["video"].folder)
    stored = json.loads(ModalityCache(folder).passport)
    found = passports(ours(root, tmp_path / "cache"))["video"]
    assert (stored["sha256"], stored["digest"]) == (found.sha256, found.digest)
    assert not examine(folder).faults
    prepare(ours(root, tmp_path / "cache"))  # as it was: reused
    weights(root / "w.pth", 1)
    with pytest.raises(CheckpointError) as caught:
        prepare(ours(root, tmp_path / "cache"))
    assert "another file under the same name" in str(caught.value)
    assert found.sha256[:12] in str(caught.value)
    assert str(folder / "index.h5") in str(caught.value)
    meant = passports(ours(root, tmp_path / "elsewhere"))["video"].sha256
    prepare(ours(root, tmp_path / "cache", f"modalities.video.weights_sha256={meant[:12]}"))


def test_keys_and_untrained_weights(tmp_path):
    root = tmp_path
    weights(root / "w.pth", **{"layer2.0.weight": None})
    with pytest.raises(CheckpointError, match=r"missing layer2\.0\.weight"):
        passports(ours(root, tmp_path))
    weights(root / "w.pth", **{"layer9.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"unexpected layer9\.weight"):
        passports(ours(root, tmp_path))
    weights(root / "w.pth", trained=False)
    assert "look untrained" in passports(ours(root, tmp_path))["video"].doubts[0]
    weights(root / "w.pth")
    assert not passports(ours(root, tmp_path))["video"].doubts


class Deep(nn.Module):
    """[N, S] -> [N, 4], through four matrices of 64 x 64, without norms or with one."""

    def __init__(self, norm: bool = False):
        super().__init__()
        torch.manual_seed(2)
        layers = [nn.Linear(64, 64) for _ in range(4)]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(64) if norm else nn.Identity(), nn.Linear(64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x[:, :64])


def test_doubts_of_weights_that_say_nothing(tmp_path):
    def doubts(model: nn.Module) -> tuple[str, ...]:
        script(tmp_path / "m.pt", model, SOUND)
        return passports(settings_of(tmp_path, kind="audio"))["m"].doubts

    assert doubts(Deep()) == ("4 of 4 matrices look drawn at random: these weights look untrained",)
    normal, heavy, zero = Deep(), Deep(), Deep()
    for at in range(4):
        nn.init.normal_(normal.layers[at].weight)
        heavy.layers[at].weight.data = heavy.layers[at].weight.data ** 3  # as training does, a few are much larger
    assert "4 of 4 matrices" in doubts(normal)[0]
    assert doubts(heavy) == ()
    assert "every norm has its first values" in doubts(Deep(norm=True))[0]
    for value in zero.parameters():
        value.data *= 0
    assert doubts(zero) == ("all its outputs on the probe are 0",)
    zero.layers[5].bias.data[2] = float("nan")
    with pytest.raises(CheckpointError, match=r"m\.pt: its output on the probe is not finite"):
        doubts(zero)


@pytest.mark.parametrize(
    ("values", "std", "span"), [([0.0, 255.0], 0.25, "1.02e+03"), ([0.0, 1.0], 57.0, "0.0175"), ([0.0, 255.0], 1.0, "")]
)
def test_a_range_of_another_scale_than_the_std_is_a_doubt(tmp_path, values, std, span):
    script(tmp_path / "m.pt", Frames(), FRAMES | {"values": values, "std": [std] * 3})
    doubts = passports(settings_of(tmp_path))["m"].doubts
    assert doubts == (
        (f"pixels differ by up to {span} after mean and std: values and std are of two scales",) if span else ()
    )


def test_published_weights_with_other_means(tmp_path, monkeypatch):
    from mbcd_cli.encoders import pretrained

    torch.manual_seed(0)
    encoder = build_encoder("video", VideoModality(encoder="efficientnet-lite0"))
    monkeypatch.setattr(pretrained, "translate", lambda keys, name: (dict(keys), []))
    file = tmp_path / pretrained.PUBLIC["efficientnet-lite0"].file
    torch.save(encoder.stages.state_dict(), file)
    monkeypatch.setattr(pretrained, "checked_sha256", lambda file, expected: "57934424" * 8)
    from mbcd_cli.preparation import trunk

    monkeypatch.setattr(trunk, "checked_sha256", lambda file, expected: "579344248a93e230" * 4)
    video = {"kind": "video", "encoder": "efficientnet-lite0", "cut": "adapter"}
    cache = {"weights_dir": tmp_path}

    def pretraining(**more: object) -> str | None:
        fitting = {**video, "mean": [127.0] * 3, "std": [128.0] * 3}
        return passports(validate({"modalities": {"video": fitting}, "cache": cache | more}))["video"].wants.pretraining

    assert pretraining() == "ImageNet-1k"
    assert pretraining(random_weights=True) is None
    with monkeypatch.context() as patch:
        patch.setattr(trunk, "checked_sha256", lambda file, expected: "0" * 64)  # a file of the user's own
        assert pretraining() is None
    with pytest.raises(CheckpointError) as caught:
        passports(validate({"modalities": {"video": video}, "cache": cache}))
    assert "the weights want mean = (127.0, 127.0, 127.0)" in str(caught.value)
    assert "modalities.NAME.mean, modalities.NAME.std" in str(caught.value)


def test_operations_of_an_lstm_are_counted(tmp_path):
    script(tmp_path / "m.pt", Steps(), SOUND)
    found = passports(settings_of(tmp_path, kind="audio"))["m"]
    # 4 gates of 2 values, from 8 samples and 2 values of state, then from 4 (both directions) and 2; 50 steps
    assert found.gflop == pytest.approx(2 * 50 * 2 * (8 * (8 + 2) + 8 * (4 + 2)) / 1e9)


def test_command(tmp_path):
    script(tmp_path / "m.pt", Frames(), FRAMES)
    flags = ("--weights-dir", tmp_path)
    told = commands.run("passport", "torchscript:m.pt", *flags, "--record", "--json")
    held = json.loads(told.stdout)["video"]
    assert held["wants"]["colour"] == "RGB"
    assert held["parameters"] == 3 * 12 * 5 + 5
    # T x H x W places of a kernel of 2 x 3 x 2 over 4 x 12 x 12, 3 channels into 5; a product and a sum each
    assert held["gflop"] == pytest.approx(2 * (3 * 10 * 11) * (12 * 3) * 5 / 1e9, rel=1e-3)
    shown = commands.run("passport", "torchscript:m.pt", *flags)
    assert held["sha256"][:30] in shown.stdout
    assert held["digest"] in shown.stdout
    script(tmp_path / "m.pt", Frames(3), FRAMES)
    assert "another file" in commands.run("passport", "torchscript:m.pt", *flags, code=1).stderr
    assert "frozen" in commands.run("passport", "--preset", "demo", code=1).stderr
    assert "there is no encoder" in commands.run("passport", "torchscrip", code=1).stderr.lower()
