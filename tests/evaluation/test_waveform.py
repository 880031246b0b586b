"""Corruptions of sound itself: what a prepared copy of the spoilt files would hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import soundfile
import torch

from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.evaluation.analyses.waveform import (
    CLIPPED_AT,
    NOISE_SNR,
    add_noise,
    clip_peaks,
    sound_corruptions,
)
from mbcd_cli.evaluation.evaluate import evaluate
from mbcd_cli.preparation.cache_plan import read_listing
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve

SMALL = [
    *("modalities.audio.kind=audio", "modalities.audio.samples=4000", "modalities.audio.nperseg=128"),
    *("modalities.audio.noverlap=64", "modalities.audio.width=4", "cache.views=1", "cache.workers=0"),
    *("model.hidden=16", "training.target_domain=beta", "cache.dtype=float32", "evaluation.report=false"),
    *("evaluation.export=[]", 'evaluation.analyses=["corruptions"]', "model.modalities=audio"),
]


def test_noise_has_the_ratio_it_claims_and_clipping_the_peak():
    rng = np.random.default_rng(0)
    sound = helpers.tone(5.0, level=0.3).astype(np.float32)
    for severity, snr in enumerate(NOISE_SNR, 1):
        noise = add_noise(sound, severity, rng).astype(np.float64) - sound
        assert 10 * np.log10(np.mean(sound.astype(np.float64) ** 2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.1)
    for severity, share in enumerate(CLIPPED_AT, 1):
        clipped = clip_peaks(sound, severity, rng)
        peak = np.abs(sound).max()
        assert np.abs(clipped).max() == pytest.approx(share * peak)
        small = np.abs(sound) < share * peak
        assert np.array_equal(clipped[small], sound[small])
    assert not add_noise(np.zeros(100, np.float32), 5, rng).any()
    assert not clip_peaks(np.zeros(100, np.float32), 5, rng).any()
    assert tuple(sorted(NOISE_SNR, reverse=True)) == NOISE_SNR
    assert tuple(sorted(CLIPPED_AT, reverse=True)) == CLIPPED_AT


def settings_for(root: Path, cache: Path):
    return resolve(sets=SMALL, flags={"dataset.root": root, "cache.dir": cache})


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    return helpers.write_dataset(tmp_path_factory.mktemp("media") / "tiny", classes=3)


def opened(root: Path, cache: Path):
    settings = settings_for(root, cache)
    prepare(settings)
    return settings, open_dataset(settings, name=root.name, modalities=("audio",))


def test_a_corrupted_view_is_that_of_the_corrupted_file(media, tmp_path):
    """Clipped files prepared as a dataset of their own hold what the disturbance gives."""
    settings, dataset = opened(media, tmp_path / "cache")
    clips = dataset.select(domains=("beta",), splits=("test",))
    spoilt = shutil.copytree(media, tmp_path / "spoilt")
    for path in (spoilt / "audio").glob("*.wav"):
        samples, rate = soundfile.read(path, dtype="float32")
        soundfile.write(
            path, np.clip(samples, *(np.abs(samples).max() * 0.2 * np.array([-1, 1]))), rate, subtype="FLOAT"
        )
    _, other = opened(spoilt, tmp_path / "cache")
    listing = read_listing(settings)
    ways = sound_corruptions("audio", dataset.modalities["audio"], listing.clips, dataset=settings.dataset)
    (clipping,) = [way for way in ways if (way.kind, way.level) == ("clipping", 3)]
    (before,) = dataset.batches(clips, batch_size=8, training=False)
    (expected,) = other.batches(clips, batch_size=8, training=False)
    (found,) = clipping.apply(before.inputs["audio"], before.clips)
    torch.testing.assert_close(found, expected.inputs["audio"][0], rtol=1e-4, atol=1e-4)
    assert (found - before.inputs["audio"][0]).abs().max() > 0.1
    # A clip's noise is its own, whatever batch it is in.
    (noise,) = [way for way in ways if (way.kind, way.level) == ("sound noise", 2)]
    (together,) = noise.apply(before.inputs["audio"], before.clips)
    (alone,) = noise.apply((before.inputs["audio"][0][1:2],), before.clips[1:2])
    assert torch.equal(together[1:2], alone)


def test_evaluate_uses_the_media_where_they_are_and_says_when_not(media, tmp_path):
    from evaluation_cases import make_checkpoint

    root = shutil.copytree(media, tmp_path / "tiny")
    settings, dataset = opened(root, tmp_path / "cache")
    settings = settings.model_copy(
        update={
            "modalities": dict(dataset.modalities),
            # As in a run: where the media lie is known to the cache alone.
            "dataset": settings.dataset.model_copy(update={"root": None}),
        }
    )
    checkpoints = {"best": make_checkpoint(settings, dataset)}

    def kinds(settings):
        cpu = torch.device("cpu")
        done = evaluate(settings, dataset, checkpoints, device=cpu, run=None, output=tmp_path / "out")
        corrupted = done.results.corruptions
        return {record.kind for record in corrupted.records}, corrupted.without_sound

    names, without = kinds(settings)
    assert {"sound noise", "clipping", "step drop", "band drop"} == names
    assert without is None
    # One file is gone.
    (tmp_path / "gone.wav").write_bytes((root / "audio" / "beta_0_2.wav").read_bytes())
    (root / "audio" / "beta_0_2.wav").unlink()
    names, without = kinds(settings)
    assert names == {"spectrogram noise", "step drop", "band drop"}
    assert "beta_0_2.wav" in without.why
    # The folder is elsewhere, and named.
    root.rename(tmp_path / "moved")
    names, without = kinds(settings)
    assert "clipping" not in names
    assert "--set dataset.root=DIR" in without.why
    shutil.copy(tmp_path / "gone.wav", tmp_path / "moved" / "audio" / "beta_0_2.wav")
    there = settings.dataset.model_copy(update={"root": tmp_path / "moved"})
    assert "clipping" in kinds(settings.model_copy(update={"dataset": there}))[0]
    # Another dataset lies there.
    manifest = tmp_path / "moved" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("beta_0_2,", "beta_0_9,"))
    names, without = kinds(settings.model_copy(update={"dataset": there}))
    assert "other clips" in without.why
