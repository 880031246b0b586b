"""Corruptions of decoded media: what each does, and that it grows with severity; their caches are in preparation/."""

from __future__ import annotations

from itertools import pairwise

import cv2
import helpers
import numpy as np
import pytest

from mbcd_cli.data.corruptions import FORMULAS, SEVERITIES, Corruption
from mbcd_cli.data.corruptions.pixels import FLOW_PIXELS, PIXELS
from mbcd_cli.data.corruptions.values import VALUES
from mbcd_cli.data.corruptions.waveform import BABBLE, RATIO, WAVEFORM
from mbcd_cli.data.modalities import KINDS, default_modality
from mbcd_cli.data.modalities.modality import load_views
from mbcd_cli.data.records import TEST_VIEW, Clip, Media
from mbcd_cli.settings import DatasetSettings

DATASET = DatasetSettings()
RATE = 8000


def scene(height: int, width: int, channels: int = 3) -> np.ndarray:
    """[4, H, W, C] uint8: smooth colours and shapes with edges, as pictures have."""
    rng, frames = np.random.default_rng(5), []
    for _ in range(4):
        picture = cv2.resize(rng.uniform(20, 200, (5, 6, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(40):
            centre = (int(rng.integers(width)), int(rng.integers(height)))
            cv2.circle(picture, centre, int(rng.integers(2, height // 6)), rng.uniform(0, 255, 3).tolist(), -1)
        frames.append(np.clip(cv2.GaussianBlur(picture, (3, 3), 0), 0, 255).astype(np.uint8)[..., :channels])
    return np.stack(frames)


def speech() -> np.ndarray:
    """[n] float32: a tone of changing pitch and loudness, with noise."""
    at = np.arange(RATE) / RATE
    tone = np.sin(2 * np.pi * (300 + 900 * at) * at) * (0.2 + 0.6 * np.sin(7 * at) ** 2)
    return (0.5 * tone + 0.02 * np.random.default_rng(1).standard_normal(RATE)).astype(np.float32)


def voices() -> list[np.ndarray]:
    return [helpers.tone(0.3 + 0.1 * k, hertz=150 * (k + 1)) for k in range(7)]


VALUES_OF = {
    "video": [(scene(72, 96),), (scene(224, 256)[:2],)],
    "flow": [(scene(72, 72, 2),)],
    "audio": [(speech(), RATE, voices)],
    "array": [(np.random.default_rng(3).standard_normal((20, 6)).astype(np.float32),)],
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_corruptions_keep_what_there_is_and_grow_with_severity(kind):
    for values, *more in VALUES_OF[kind]:
        for name, corrupt in default_modality("x", kind).corruptions.items():
            before, errors = values.copy(), []
            for severity in SEVERITIES:
                out = corrupt(values, severity, np.random.default_rng([7, 8]), *more)
                assert np.array_equal(values, before), "the input must not change"
                assert (out.shape, out.dtype) == (values.shape, values.dtype), name
                assert np.array_equal(out, corrupt(values, severity, np.random.default_rng([7, 8]), *more))
                errors.append(np.mean((out.astype(np.float64) - values) ** 2))
            assert errors[0] > 0, name
            # The same as falling PSNR of frames and SNR of sound.
            assert all(b > a for a, b in pairwise(errors)), (name, values.shape, errors)


STRENGTH = {
    "video": "gaussian-noise 228.36, shot-noise 246.4, impulse-noise 232.16, defocus-blur 39.2, glass-blur 76.055, "
    "motion-blur 102.33, zoom-blur 127.61, snow 403.55, frost 341.19, fog 360.27, brightness 246.41, contrast 226.35, "
    "elastic-transform 52.461, pixelate 69.481, jpeg-compression 98.31",
    "flow": "gaussian-noise 228.01, impulse-noise 233.86, defocus-blur 44.779, elastic-transform 58.414, "
    "pixelate 76.631, jpeg-compression 41.917",
    "audio": "white-noise 0.40141, babble 0.40141, reverberation 1.2694, clipping 0.58293, band-limit 0.64911, "
    "dropouts 0.43332",
    "array": "noise 6.468, value-drop 3.616",
}
"""Root mean square error of each kind, summed over severities, as it was when `FORMULAS` became what it is."""


@pytest.mark.parametrize("kind", list(KINDS))
def test_whoever_changes_a_formula_raises_their_version(kind):
    values, *more = VALUES_OF[kind][0]
    told = dict(line.rsplit(" ", 1) for line in STRENGTH[kind].split(", "))
    assert list(told) == list(default_modality("x", kind).corruptions)
    for name, corrupt in default_modality("x", kind).corruptions.items():
        spoilt = [corrupt(values, severity, np.random.default_rng(7), *more) for severity in SEVERITIES]
        strength = sum(np.sqrt(np.mean((out.astype(np.float64) - values) ** 2)) for out in spoilt)
        assert strength == pytest.approx(float(told[name]), rel=1e-3), f"{name}: raise FORMULAS, and write this here"
    assert FORMULAS == 1


def test_the_kinds_are_those_of_the_field():
    assert len(PIXELS) == 15
    assert len(WAVEFORM) == 6
    assert set(FLOW_PIXELS) < set(PIXELS)
    assert not default_modality("x", "array").model_copy(update={"whole": True}).corruptions
    assert set(VALUES_OF) == set(KINDS)
    for name in [*PIXELS, *WAVEFORM, *VALUES]:
        corruption = Corruption.of_folder(Corruption(name, 3).folder)
        assert (corruption.name, corruption.severity) == (name, 3)
    assert Corruption.of_folder("video-4c4d5e6f7a8b") is None
    for name in ("fog-0-v1", "fog-3", "fog-3-v0", "-3-v1"):
        assert Corruption.of_folder(name) is None


def test_frames_are_changed_as_the_formulas_say():
    rng = np.random.default_rng(0)
    grey = np.full((2, 64, 80, 3), 100, np.uint8)
    assert set(PIXELS["brightness"](grey, 2, rng).ravel()) == {151}  # 100 + 0.2 * 255
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 100
    assert PIXELS["brightness"](red, 2, rng)[0, 0, 0].tolist() == [151, 0, 0], "hue and saturation stay"
    for still in (
        "contrast",
        "defocus-blur",
        "motion-blur",
        "zoom-blur",
        "glass-blur",
        "elastic-transform",
        "pixelate",
    ):
        assert np.array_equal(PIXELS[still](grey, 5, rng), grey), f"{still} leaves a flat frame as it is"
    salted = PIXELS["impulse-noise"](grey, 5, rng)
    assert np.mean(salted == 255) == pytest.approx(0.135, abs=0.01)
    assert np.mean(salted == 0) == pytest.approx(0.135, abs=0.01)
    assert PIXELS["gaussian-noise"](grey, 1, rng).std() == pytest.approx(0.08 * 255, rel=0.03)
    shot = PIXELS["shot-noise"](grey, 1, rng).std() / 255
    assert shot == pytest.approx(np.sqrt(100 / 255 / 60), rel=0.03)
    # What the scene has stands still, what the sensor has does not.
    for name in PIXELS:
        out = PIXELS[name](np.repeat(scene(64, 64)[:1], 2, axis=0), 3, rng)
        moves = name in ("gaussian-noise", "shot-noise", "impulse-noise", "snow")
        assert np.array_equal(out[0], out[1]) != moves, name


def test_sound_is_changed_by_the_ratio_that_is_said():
    sound = speech()

    def ratio(out: np.ndarray) -> float:
        noise = out.astype(np.float64) - sound
        return 10 * np.log10(np.mean(sound.astype(np.float64) ** 2) / np.mean(noise**2))

    for severity, wanted in zip(SEVERITIES, RATIO, strict=True):
        for name in ("white-noise", BABBLE):
            out = WAVEFORM[name](sound, severity, np.random.default_rng(2), RATE, voices)
            assert ratio(out) == pytest.approx(wanted, abs=0.1), name
        rng = np.random.default_rng(2)
        peak = np.abs(WAVEFORM["clipping"](sound, severity, rng, RATE, voices)).max() / np.abs(sound).max()
        assert peak == pytest.approx((0.5, 0.3, 0.2, 0.1, 0.05)[severity - 1])
        gone = np.mean(WAVEFORM["dropouts"](sound, severity, rng, RATE, voices) == 0)
        assert gone == pytest.approx((0.06, 0.1, 0.2, 0.36, 0.5)[severity - 1], abs=0.01)  # of 50 packets
        spectrum = np.abs(np.fft.rfft(WAVEFORM["band-limit"](sound, severity, rng, RATE, voices)))
        assert spectrum[int((0.5, 0.35, 0.25, 0.15, 0.1)[severity - 1] * 4001) + 1 :].max() < 1e-2
    late = WAVEFORM["reverberation"](np.eye(1, 4000, dtype=np.float32)[0], 3, np.random.default_rng(0), RATE, voices)
    assert late[0] == 1
    assert np.std(late[2000:4000]) < 0.2 * np.std(late[1:400]), "the tail decays"
    for name, corrupt in WAVEFORM.items():
        for silence in (np.zeros(100, np.float32), np.zeros(1, np.float32)):
            assert not corrupt(silence, 5, np.random.default_rng(0), RATE, list).any(), name


def test_severity_0_is_the_clean_view_and_a_clip_has_its_own(tmp_path):
    frames = helpers.write_video(tmp_path / "a.mp4", helpers.moving_texture(16))
    media = {
        "video": Media(frames),
        "flow": Media(
            helpers.write_array(tmp_path / "flow.npy", np.stack([scene(72, 96, 2)] * 3).reshape(-1, 72, 96, 2))
        ),
        "computed flow": Media(frames, computed=1),
        "audio": Media(helpers.write_wav(tmp_path / "a.wav", speech())),
        "array": Media(helpers.write_array(tmp_path / "a.npy", np.arange(6, dtype=np.float32))),
    }
    others = tuple(Media(helpers.write_wav(tmp_path / f"{k}.wav", voice)) for k, voice in enumerate(voices()))
    others = (media["audio"], Media(tmp_path / "gone.wav"), *others)
    for told, item in media.items():
        kind = told.split()[-1]
        modality = default_modality(kind, kind)
        if kind == "array":
            modality = modality.resolve([item])

        def view(identity: str, corruption: Corruption | None, kind=kind, item=item, modality=modality) -> np.ndarray:
            clip = Clip(identity, "d", "test", 0, "x", {kind: item})
            asked = {"views": [TEST_VIEW], "seed": 0, "dataset": DATASET, "corruption": corruption}
            ((part,),) = load_views(clip, kind, modality, **asked)
            return part

        clean = view("a", None)
        for name in modality.corruptions:
            assert np.array_equal(view("a", Corruption(name, 0, others)), clean)
            changed = view("a", Corruption(name, 4, others))
            assert (changed.shape, changed.dtype) == (clean.shape, clean.dtype)
            assert not np.array_equal(changed, clean), name
            if "noise" in name or name == BABBLE:
                assert not np.array_equal(changed, view("b", Corruption(name, 4, others))), name
