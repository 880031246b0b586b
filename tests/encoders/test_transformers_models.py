"""`hf:FOLDER`: tiny models of every family, ours against their owners'."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import helpers
import owners
import pytest
import torch
from typer.testing import CliRunner

from mbcd_cli.cli import app
from mbcd_cli.data.modalities import KINDS
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders import build_encoder, described_encoders, format_of
from mbcd_cli.encoders.formats import import_optional
from mbcd_cli.encoders.staged import StagedEncoder
from mbcd_cli.encoders.transformers_families import import_transformers
from mbcd_cli.encoders.transformers_models import read_model
from mbcd_cli.errors import CheckpointError, SettingsError
from mbcd_cli.preparation.trunk import weights_file
from mbcd_cli.settings import Settings

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

SOUND = ("ast", "wav2vec2", "hubert", "clap", "clap, fused")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, owners.Owner]]:
    import_transformers()
    import_optional("torchvision", "timm")
    made = {}
    for name, make in owners.OWNERS.items():
        folder = tmp_path_factory.mktemp("hf") / name.replace(", ", "-")
        made[name] = (folder, make(folder))
    return made


def described(folder: Path, kind: str, **more: object) -> Modality:
    if kind == "audio" and "clap" not in folder.name:
        more = {"samples": 8000, **more}
    modality = KINDS[kind](encoder=f"hf:{folder}", cut="pool", **more)
    return described_encoders(Settings(modalities={"m": modality})).modalities["m"]


def loaded(modality: Modality) -> StagedEncoder:
    encoder = build_encoder("m", modality)
    format_of(modality).load(encoder, modality, Path())
    return encoder.eval()


@pytest.mark.parametrize("name", owners.OWNERS)
def test_equals_its_owner_and_every_cut_is_the_whole(folders, name):
    folder, owner = folders[name]
    kind = "audio" if name in SOUND else "video"
    modality = described(folder, kind)
    view = owners.views(kind, modality)
    encoder = loaded(modality)
    with torch.no_grad():
        ours, theirs = encoder((view,)), owner(view)
        assert ours.shape == theirs.shape == (2, encoder.dim)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        for cut in encoder.names:
            trunk, tail = encoder.cut(cut)
            (part,) = trunk((view,))
            assert part.shape[:2] == view.shape[:2] if cut in ("input", "patch") else part.is_contiguous()
            assert torch.equal(tail.eval()((part,)), ours), cut


def rewrite(file: Path, **changes: object) -> None:
    """Some keys of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def nested(folder: Path, **changes: object) -> None:
    """The same of the configuration of CLIP's tower."""
    file = folder / "config.json"
    rewrite(file, vision_config=json.loads(file.read_text())["vision_config"] | changes)


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The folder's weights, changed."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


SPOILT = {
    "no config": (lambda f: drop(f, "config.json"), "there is no config.json"),
    "config of no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is no readable JSON"),
    "unknown": (lambda f: rewrite(f / "config.json", model_type="llama"), "its model_type is 'llama'"),
    "remote code": (lambda f: rewrite(f / "config.json", auto_map={"AutoModel": "x.M"}), "never run"),
    "code beside it": (
        lambda f: (f / "modeling_x.py").write_text("raise SystemExit"),
        r"modeling_x.py\), which is never",
    ),
    "code of the processor": (
        lambda f: rewrite(f / "preprocessor_config.json", auto_map={"AutoImageProcessor": "x.P"}),
        r"preprocessor_config.json: asks for code of its own \(auto_map\)",
    ),
    "a list for a type": (lambda f: rewrite(f / "config.json", model_type=["clip"]), r"model_type is \['clip'\]"),
    "a config of braces": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json: is no readable JSON"),
    "a layer of another type": (
        lambda f: nested(f, hidden_size="24"),
        "clip/config.json: is no CLIPVisionConfig: .*hidden_size.*int",
    ),
    "no such activation": (lambda f: nested(f, hidden_act="x"), r"cannot be built .*KeyError: 'x'"),
    "a mean of text": (lambda f: rewrite(f / "preprocessor_config.json", image_mean="x"), "image_mean: .* valid list"),
    "a scale of nothing": (lambda f: rewrite(f / "preprocessor_config.json", rescale_factor=0), "rescale_factor"),
    "quantised": (lambda f: rewrite(f / "config.json", quantization_config={}), "weights that are quantised"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "has an adapter beside its weights"),
    "no processor": (lambda f: drop(f, "preprocessor_config.json"), "nothing says how its input is scaled"),
    "another size": (
        lambda f: rewrite(f / "preprocessor_config.json", crop_size={"height": 48, "width": 48}),
        "frames of 48 pixels, and its config.json wants 32",
    ),
    "a size that is no square": (
        lambda f: rewrite(f / "preprocessor_config.json", size={"height": 40, "width": 60}),
        "no square size of frames",
    ),
    "frames as they are": (
        lambda f: rewrite(f / "preprocessor_config.json", do_resize=False),
        "resizes no frames",
    ),
    "no mean": (lambda f: rewrite(f / "preprocessor_config.json", image_mean=None), "has no image_mean"),
    "no weights": (lambda f: drop(f, "model.safetensors"), "has no model.safetensors"),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99),
        "model.safetensors: cannot be read .* 99 b",
    ),
    "missing key": (
        lambda f: weights(f, lambda state: state.pop("vision_model.post_layernorm.bias")),
        "1 of its keys differ:\n  missing post_layernorm.bias",
    ),
    "leftover key": (
        lambda f: weights(f, lambda state: state.update({"vision_model.extra.weight": torch.zeros(2)})),
        "1 of its keys differ:\n  unexpected extra.weight",
    ),
    "other shape": (
        lambda f: weights(f, lambda state: state.update({"vision_model.pre_layrnorm.bias": torch.zeros(3)})),
        r"shape of pre_layrnorm.bias: \(3,\) in the file, \(24,\) in the encoder",
    ),
}


def prepared(folder: Path) -> None:
    """What `prepare` does with a folder, before it decodes."""
    modality = described(folder, "video")
    weights_file(Settings(), modality)
    loaded(modality)


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_folder_is_one_clear_message(folders, tmp_path, what):
    spoil, words = SPOILT[what]
    folder = tmp_path / "clip"
    shutil.copytree(folders["clip"][0], folder)
    spoil(folder)
    with pytest.raises((CheckpointError, SettingsError), match=words) as caught:
        prepared(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("size", [{"shortest_edge": 40, "longest_edge": None}, {"shortest_edge": 40}, 40])
def test_the_short_side_is_the_processors(folders, tmp_path, size):
    folder = tmp_path / "clip"
    shutil.copytree(folders["clip"][0], folder)
    rewrite(folder / "preprocessor_config.json", size=size)
    assert (described(folder, "video").short_side, described(folder, "video").crop) == (40, 32)


def test_the_digest_is_that_of_the_weights_that_are_read(folders, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(folders["clip"][0], folder)
    state = load_file(folder / "model.safetensors")
    save_file({"a": torch.zeros(2)}, folder / "other.safetensors")  # nothing reads it
    modality, whole = described(folder, "video"), weights_file(Settings(), described(folder, "video"))
    drop(folder, "other.safetensors")
    assert weights_file(Settings(), modality) == whole
    drop(folder, "model.safetensors")
    save_file({"a": torch.zeros(2)}, folder / "other.safetensors")
    digests = set()
    for shift in (0, 1):
        torch.save({key: value + shift for key, value in state.items()}, folder / "pytorch_model.bin")
        digests.add(weights_file(Settings(), modality).sha256)
    assert len(digests) == 2


def test_weights_in_shards_are_those_of_one_file_and_all_of_the_digest(folders, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(folders["clip"][0], folder)
    state, places = load_file(folder / "model.safetensors"), {}
    drop(folder, "model.safetensors")
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        part = {key: state[key] for key in sorted(state)[number - 1 :: 2]}
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    modality = described(folder, "video")
    ours, whole = loaded(modality).state_dict(), loaded(described(folders["clip"][0], "video")).state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in ours.items())
    before = weights_file(Settings(), modality).sha256
    save_file({key: value + 1 for key, value in part.items()}, folder / name, metadata={"format": "pt"})
    assert weights_file(Settings(), modality).sha256 != before


@pytest.mark.parametrize("inner", [False, True])
def test_a_kernel_that_a_folder_names_is_not_fetched(folders, tmp_path, inner):
    """transformers takes the name of an attention with a slash in it for a repository of compiled code."""
    folder = tmp_path / "clip"
    shutil.copytree(folders["clip"][0], folder)
    told = {"_attn_implementation": "owner/kernel"}
    nested(folder, **told) if inner else rewrite(folder / "config.json", **told)
    prepared(folder)
    read_model(import_transformers().CLIPModel, folder)


def test_weights_of_another_family_are_refused(folders, tmp_path):
    shutil.copytree(folders["siglip"][0], tmp_path / "m")
    shutil.copy(folders["videomae"][0] / "model.safetensors", tmp_path / "m")
    with pytest.raises(CheckpointError, match="does not fit encoder siglip"):
        loaded(described(tmp_path / "m", "video"))


def test_a_pickle_runs_nothing(folders, tmp_path):
    shutil.copytree(folders["ast"][0], tmp_path / "m")
    drop(tmp_path / "m", "model.safetensors")

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Hostile()}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        loaded(described(tmp_path / "m", "audio"))
    assert not (tmp_path / "ran").exists()
    shutil.copytree(folders["ast"][0], tmp_path / "n")
    state = load_file(tmp_path / "n" / "model.safetensors")
    torch.save(state, tmp_path / "n" / "pytorch_model.bin")
    drop(tmp_path / "n", "model.safetensors")
    loaded(described(tmp_path / "n", "audio"))


def test_settings_come_from_the_folder_unless_they_contradict_it(folders):
    video = described(folders["videomae"][0], "video", flip=0.0, short_side=64)
    assert (video.frames, video.crop, video.test_crop, video.short_side, video.flip) == (4, 32, 32, 64, 0.0)
    assert video.mean == pytest.approx((127.5, 127.5, 127.5))
    dino = described(folders["dinov2"][0], "video", frames=3)
    assert (dino.frames, dino.short_side, dino.crop) == (3, 36, 32)
    sound = described(folders["clap"][0], "audio")
    assert (sound.front_end, sound.sample_rate, sound.samples) == ("waveform", 16000, 32000)
    for kind, name, wrong in (
        ("video", "videomae", {"frames": 8}),
        ("video", "videomae", {"crop": 24}),
        ("video", "clip", {"mean": (104.0, 117.0, 123.0)}),
        ("audio", "ast", {"sample_rate": 44100}),
        ("audio", "ast", {"front_end": "spectrogram"}),
        ("video", "ast", {}),
    ):
        (field,) = wrong or ("encoder",)
        with pytest.raises(SettingsError, match=rf"modalities\.m\.{field}"):
            described(folders[name][0], kind, **wrong)
    with pytest.raises(SettingsError, match=r"cannot read views of shape \[1, 9\]"):
        described(folders["wav2vec2"][0], "audio", front_end="waveform", samples=9)


@pytest.mark.parametrize(
    ("head", "licence", "data"),
    [
        ("license: mit\ndatasets:\n- imagenet-1k\n- owner/sounds\ntags:\n- x", "mit", "imagenet-1k, owner/sounds"),
        ("datasets: [imagenet-1k, 'kinetics']\nlicense: apache-2.0", "apache-2.0", "imagenet-1k, kinetics"),
        ("tags:\n- datasets", None, None),
        (None, None, None),
    ],
)
def test_what_the_card_tells(folders, tmp_path, head, licence, data):
    shutil.copytree(folders["clip"][0], tmp_path / "clip")
    text = "" if head is None else f"---\n{head}\n---\n"
    (tmp_path / "clip/README.md").write_text(f"{text}license: none of the head\ndatasets: none\n")
    modality = described(tmp_path / "clip", "video")
    wants = format_of(modality).wants(modality)
    assert (wants.licence, wants.pretraining) == (licence, data)


def test_a_missing_package_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SettingsError, match=r"transformers cannot be imported") as caught:
        described(folders["clip"][0], "video")
    assert "uv sync --group hf" in caught.value.remedy


@pytest.mark.parametrize(("cut", "dtype"), [("block1", "float16"), ("adapter", "int8")])
def test_from_media_to_results(folders, tmp_path, cut, dtype):
    """Prepared, trained from the cache alone, evaluated: with the folders gone."""
    root = helpers.write_dataset(tmp_path / "tiny")
    for name in ("videomae", "ast"):
        shutil.copytree(folders[name][0], tmp_path / "weights" / name)
    common = ["--cache-dir", tmp_path / "cache", "--json", "--set", f"cache.dtype={dtype}"]
    common += ["--set", "cache.workers=0", "--set", "cache.views=2"]
    for name, encoder in (("video", "videomae"), ("audio", "ast")):
        common += ["--set", f"modalities.{name}.encoder=hf:{encoder}", "--set", f"modalities.{name}.cut={cut}"]
    common += ["--set", "modalities.audio.samples=8000"]

    def call(*words: object) -> dict:
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    prepare = ["prepare", "manifest", "--root", root, "--name", "tiny", "--modalities", "video,audio", *common]
    prepare += ["--weights-dir", tmp_path / "weights"]
    first = call(*prepare)
    assert call(*prepare)["modalities"]["video"]["fingerprint"] == first["modalities"]["video"]["fingerprint"]
    shutil.rmtree(tmp_path / "weights")
    train = ["train", "--dataset", "tiny", "--modalities", "video,audio", "--run", tmp_path / "run", "--epochs", 1]
    train += ["--target-domain", "beta", "--batch-size", 2, "--set", "model.hidden=8"]
    call(*train, *common)
    evaluate = ["evaluate", "--run", tmp_path / "run", "--cache-dir", tmp_path / "cache", "--json"]
    found = call(*evaluate, "--set", "evaluation.analyses=[]")
    assert found


@pytest.mark.parametrize("name", ["clip", "ast"])
def test_keeps_what_every_encoder_promises(folders, name):
    told = CliRunner().invoke(app, ["check", "encoder", f"hf:{folders[name][0]}", "--json"])
    promises = json.loads(told.stdout)["promises"]
    assert len(promises) == 7
    assert [one for one in promises if not one["holds"]] == []
