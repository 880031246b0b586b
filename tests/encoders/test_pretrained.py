"""Public checkpoint formats: one-to-one names, every deviation named, nothing executed."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.encoders import build_encoder, pretrained
from mbcd_cli.encoders.pretrained import find_weights, load_pretrained
from mbcd_cli.errors import CheckpointError


def audio():
    return build_encoder("audio", AudioModality(encoder="audio-resnet18", cut="layer4"))


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict under VGGSound's names."""
    torch.manual_seed(seed)
    own = audio().stages.state_dict()
    return {f"audnet.{key.removeprefix('stem.')}": tensor for key, tensor in own.items()}


def save(path: Path, state: dict, **options) -> Path:
    torch.save({"epoch": 9, "model_state_dict": state, "best": np.float64(0.5)}, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_both_file_formats_load(tmp_path, zipped):
    state = published() | {"audnet.fc.weight": torch.zeros(309, 512), "audnet.fc.bias": torch.zeros(309)}
    file = save(tmp_path / "vggsound_avgpool.pth.tar", state, _use_new_zipfile_serialization=zipped)
    encoder = audio()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    load_pretrained(encoder, "audio-resnet18", file, sha256=digest[:8].upper())
    own = encoder.stages.state_dict()
    assert torch.equal(own["stem.conv1.weight"], state["audnet.conv1.weight"])
    assert torch.equal(own["layer3.0.downsample.1.running_var"], state["audnet.layer3.0.downsample.1.running_var"])


def test_bare_and_data_parallel_state_dicts_load(tmp_path):
    bare = {key.removeprefix("audnet."): v for key, v in published(1).items()}
    wrapped = {f"module.{key}": v for key, v in published(1).items()}
    for number, content in enumerate((bare, wrapped)):
        file = tmp_path / f"{number}.pth"
        torch.save(content, file)
        encoder = audio()
        load_pretrained(encoder, "audio-resnet18", file)
        assert torch.equal(encoder.stages["stem"].conv1.weight, bare["conv1.weight"])


def test_every_deviation_is_named_at_once_and_nothing_is_loaded(tmp_path):
    state = published()
    del state["audnet.layer1.0.bn1.running_mean"]
    state["audnet.layer9.0.conv1.weight"] = torch.zeros(1)
    state["audnet.layer2.7.conv1.weight"] = torch.zeros(1)
    state["layer4.0.conv1.weight"] = torch.zeros(1)
    state["audnet.conv1.weight"] = torch.zeros(64, 3, 7, 7)
    encoder = audio()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(encoder, "audio-resnet18", save(tmp_path / "x.pth", state))
    message = str(caught.value)
    for line in (
        "missing layer1.0.bn1.running_mean",
        "unexpected layer9.0.conv1.weight",
        "unexpected layer2.7.conv1.weight",
        "unexpected layer4.0.conv1.weight",
        "shape of stem.conv1.weight: (64, 3, 7, 7) in the file, (64, 1, 7, 7) in the encoder",
        "x.pth",
    ):
        assert line in message
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_rgb_weights_do_not_fit_the_flow_network(tmp_path):
    torch.manual_seed(0)
    encoder = build_encoder("flow", FlowModality(encoder="slowonly-r50", cut="layer4"))
    state = {f"backbone.{k.removeprefix('stem.')}": v for k, v in encoder.stages.state_dict().items()}
    state["backbone.conv1.conv.weight"] = torch.zeros(64, 3, 1, 7, 7)
    file = tmp_path / "slowonly.pth"
    torch.save({"meta": {"epoch": 196}, "state_dict": state | {"cls_head.fc_cls.bias": torch.zeros(400)}}, file)
    with pytest.raises(CheckpointError, match="1 of its keys differ") as caught:
        load_pretrained(encoder, "slowonly-r50", file)
    assert "shape of stem.conv1.conv.weight" in str(caught.value)


def test_another_file_than_expected_is_refused(tmp_path):
    file = save(tmp_path / "x.pth", published())
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_pretrained(audio(), "audio-resnet18", file, sha256="0dd54025")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_hostile_file_executes_nothing(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.pth"
    if how == "pickle":
        file.write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"model_state_dict": Hostile()}, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        load_pretrained(audio(), "audio-resnet18", file)
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half"])
def test_damaged_files_are_one_clear_error(tmp_path, content):
    file = tmp_path / "x.pth"
    if content == "half":
        save(file, published())
        file.write_bytes(file.read_bytes()[:100_000])
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pth: is no readable checkpoint"):
        load_pretrained(audio(), "audio-resnet18", file)


def test_file_without_a_state_dict(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_pretrained(audio(), "audio-resnet18", tmp_path / "x.pth")


@pytest.mark.parametrize("encoder_name", list(pretrained.PUBLIC))
def test_missing_file_says_which_one_and_where_to_put_it(tmp_path, encoder_name):
    public = pretrained.PUBLIC[encoder_name]
    with pytest.raises(CheckpointError) as caught:
        find_weights(encoder_name, None, tmp_path)
    message = str(caught.value)
    assert str(tmp_path / public.file) in message
    assert public.origin in message
    assert "--weights-dir" in message
    (tmp_path / public.file).touch()
    assert find_weights(encoder_name, None, tmp_path) == tmp_path / public.file
    with pytest.raises(CheckpointError, match=r"other\.pth"):
        load_pretrained(audio(), encoder_name, tmp_path / "other.pth")


def test_published_names_hold_the_papers_and_openmmlabs_digests():
    assert pretrained.PUBLIC["slowfast-r101"].file == "slowfast_r101_8x8x1_256e_kinetics400_rgb_20210218-0dd54025.pth"
    assert pretrained.PUBLIC["slowonly-r50"].file == "slowonly_r50_8x8x1_256e_kinetics400_flow_20200704-6b384243.pth"
    for public in (pretrained.PUBLIC["slowfast-r101"], pretrained.PUBLIC["slowonly-r50"]):
        assert public.file.endswith(f"-{public.sha256}.pth")
