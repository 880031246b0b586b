"""Views against independent numpy computations: sampling, geometry, spectrograms, and what is random about them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np
import pytest
from helpers import (
    AV_DIGITS,
    frame_numbers,
    needs_av_digits,
    numbered_frames,
    tone,
    write_array,
    write_frames,
    write_video,
    write_wav,
)

from mbcd_cli.data.media import video as module
from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.audio import AudioModality, audio_view, fit_samples, silence_before
from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.frames import crop_box, sample_indices
from mbcd_cli.data.modalities.modality import load_views, view_generator
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.records import TEST_VIEW, Clip, Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

DATASET = DatasetSettings()
VIDEO = VideoModality(frames=8, short_side=48, crop=40)


def clip_of(name: str, path, identity: str = "c0", **media) -> Clip:
    return Clip(identity, "a", "train", 0, "0", {name: Media(path, **media)})


def load(clip: Clip, settings, views, *, seed: int = 0, name: str | None = None) -> list[np.ndarray]:
    loaded = load_views(clip, name or next(iter(clip.media)), settings, views=views, seed=seed, dataset=DATASET)
    assert all(len(parts) == 1 for parts in loaded)
    return [parts[0] for parts in loaded]


# --- frame sampling ------------------------------------------------------------------------------------------------


def test_spread_sampling():
    settings = VideoModality(frames=4)
    assert sample_indices(16, settings, None).tolist() == [2, 6, 10, 14]
    assert sample_indices(4, settings, None).tolist() == [0, 1, 2, 3]
    assert sample_indices(2, settings, None).tolist() == [0, 0, 1, 1]
    drawn = np.stack([sample_indices(16, settings, np.random.default_rng(s)) for s in range(300)])
    for segment in range(4):  # every frame of each quarter, and none of another
        assert sorted(set(drawn[:, segment].tolist())) == list(range(4 * segment, 4 * segment + 4))


def test_interval_sampling():
    settings = VideoModality(frames=4, interval=2)
    assert sample_indices(11, settings, None).tolist() == [2, 4, 6, 8]
    assert sample_indices(7, settings, None).tolist() == [0, 2, 4, 6]
    assert sample_indices(5, settings, None).tolist() == [0, 2, 4, 1]  # begins again
    starts = set()
    for seed in range(200):
        drawn = sample_indices(11, settings, np.random.default_rng(seed))
        assert np.diff(drawn).tolist() == [2, 2, 2]
        starts.add(int(drawn[0]))
    assert starts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("frames", "interval"), [(32, 2), (8, 4), (4, 3), (5, 1)])
def test_interval_sampling_as_the_reference_does(frames, interval):
    """Against SampleFrames of MMAction2 0.x as its documentation gives it, for one clip per video."""
    settings = VideoModality(frames=frames, interval=interval, sampling="reference")
    length = frames * interval
    for count in range(1, 3 * length):
        average = count - length + 1
        offset = int(average / 2.0) if count > length - 1 else 0
        expected = (offset + np.arange(frames) * interval) % count
        assert np.array_equal(sample_indices(count, settings, None), expected), count
    count = length + 3
    drawn = [sample_indices(count, settings, np.random.default_rng(seed)) for seed in range(100)]
    assert {int(pick[0]) for pick in drawn} == {0, 1, 2, 3}  # randint(average)
    assert all(np.array_equal(pick - pick[0], np.arange(frames) * interval) for pick in drawn)
    for count in (1, length - 1, length):
        assert sample_indices(count, settings, np.random.default_rng(0))[0] == 0


def test_the_reference_leaves_out_the_last_frame_of_a_clip_file(tmp_path):
    path = write_video(tmp_path / "x.mp4", numbered_frames(12))
    folder = write_frames(tmp_path / "frames", numbered_frames(12))
    whole = {"frames": 5, "interval": 2, "short_side": 48, "crop": 48}

    def first(sampling, path, **media):
        settings = VideoModality(sampling=sampling, **whole)
        ((part,),) = load_views(
            clip_of("video", path, **media), "video", settings, views=[TEST_VIEW], seed=0, dataset=DATASET
        )
        return frame_numbers(part.transpose(1, 2, 3, 0))[0]

    assert first("centred", path) == first("centred", folder) == 1  # (12 - 9) // 2
    assert first("reference", path) == 1  # 11 - 10 = 1 other start, rounded up
    assert first("reference", folder) == 1  # 12 - 10 = 2
    span = {"start": 0, "stop": 11, "unit": "frame"}
    assert first("reference", path, **span) == first("reference", path)  # 11 frames of a longer file are 11
    settings = VideoModality(sampling="reference", frames=12, interval=1, short_side=48, crop=48)
    ((part,),) = load_views(clip_of("video", path), "video", settings, views=[TEST_VIEW], seed=0, dataset=DATASET)
    assert frame_numbers(part.transpose(1, 2, 3, 0)) == [*range(11), 0]


# --- geometry ------------------------------------------------------------------------------------------------------


def ramp(count: int, height: int, width: int) -> np.ndarray:
    """Frames whose red is 2 x, whose green is 2 y and whose blue is 10 t."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = 2 * np.arange(width)
    frames[..., 1] = 2 * np.arange(height)[:, None]
    frames[..., 2] = 10 * np.arange(count)[:, None, None]
    return frames


def test_test_view_is_resized_and_cropped_at_the_centre(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (16, 60, 90, 3), dtype=np.uint8)
    folder = write_frames(tmp_path / "clip", frames, suffix="png")
    (got,) = load(clip_of("video", folder), VIDEO, [TEST_VIEW])
    picked = frames[[1, 3, 5, 7, 9, 11, 13, 15]]
    resized = np.stack([cv2.resize(f, (72, 48), interpolation=cv2.INTER_LINEAR) for f in picked])
    expected = resized[:, 4:44, 16:56].transpose(3, 0, 1, 2)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)
    whole = VIDEO.model_copy(update={"test_crop": 48})
    (wide,) = load(clip_of("video", folder), whole, [TEST_VIEW])
    np.testing.assert_array_equal(wide, resized[:, :, 12:60].transpose(3, 0, 1, 2))


def test_training_crops_lie_in_the_ranges_asked_for(tmp_path):
    folder = write_frames(tmp_path / "clip", ramp(8, 48, 96), suffix="png")
    settings = VideoModality(frames=4, short_side=48, crop=32, crop_area=(0.2, 0.4), crop_aspect=(0.5, 2.0))
    got = load(clip_of("video", folder), settings, list(range(200)))
    mirrored, areas, aspects = 0, [], []
    for view in got:
        red, green = view[0, 0].astype(float).mean(0), view[1, 0].astype(float).mean(1)
        # Slope of the ramp per pixel of the view, from its inside: the box's width and height.
        width = abs(red[-4] - red[3]) / (len(red) - 7) / 2 * 32
        height = (green[-4] - green[3]) / (len(green) - 7) / 2 * 32
        mirrored += red[0] > red[-1]
        areas.append(width * height / (48 * 96))
        aspects.append(width / height)
        assert (np.diff(view[2, :, 0, 0].astype(int)) >= 0).all()  # time runs forward
    assert 70 < mirrored < 130
    assert min(areas) > 0.19
    assert max(areas) < 0.42
    assert min(aspects) < 0.65
    assert 1.6 < max(aspects) < 2.1
    assert np.std(areas) > 0.04


def test_a_crop_of_the_whole_frame_only_resizes(tmp_path):
    frames = ramp(4, 40, 40)
    folder = write_frames(tmp_path / "clip", frames, suffix="png")
    settings = VideoModality(frames=4, short_side=40, crop=40, crop_area=(1, 1), crop_aspect=(1, 1), flip=0)
    got, test = load(clip_of("video", folder), settings, [0, TEST_VIEW])
    np.testing.assert_array_equal(got, test)
    flipped = settings.model_copy(update={"flip": 1.0})
    (mirror,) = load(clip_of("video", folder), flipped, [0])
    np.testing.assert_array_equal(mirror, test[..., ::-1])


def test_crop_box_falls_back_to_the_centre_square():
    settings = VideoModality(short_side=64, crop=32, crop_area=(1, 1), crop_aspect=(3, 3))
    assert crop_box(20, 50, settings, np.random.default_rng(0)) == (0, 15, 20, 20)


def test_all_frames_of_a_view_share_its_crop_and_flip(tmp_path):
    folder = write_frames(tmp_path / "clip", ramp(8, 48, 96), suffix="png")
    for view in load(clip_of("video", folder), VIDEO, range(10)):
        assert (view[:2] == view[:2, :1]).all()


def test_mirrored_flow_moves_the_other_way(tmp_path):
    u = np.full((6, 32, 32), 200, np.uint8)
    v = np.repeat(np.linspace(0, 248, 32).astype(np.uint8)[None, None], 6, 0).repeat(32, 1)
    media = {"path_v": write_frames(tmp_path / "v", v, suffix="png")}
    clip = clip_of("flow", write_frames(tmp_path / "u", u, suffix="png"), **media)
    base = {"frames": 4, "short_side": 32, "crop": 32, "crop_area": (1, 1), "crop_aspect": (1, 1)}
    plain, test = load(clip, FlowModality(**base, flip=0), [0, TEST_VIEW])
    (mirror,) = load(clip, FlowModality(**base, flip=1), [0])
    assert plain.shape == (2, 4, 32, 32)
    np.testing.assert_array_equal(plain, test)
    assert (plain[0] == 200).all()
    assert (mirror[0] == 55).all()
    np.testing.assert_array_equal(mirror[1], plain[1][..., ::-1])


@pytest.mark.parametrize("shorter", ["u", "v"])
@pytest.mark.parametrize("interval", [0, 2])
def test_both_directions_show_the_frames_that_both_have(tmp_path, shorter, interval):
    made = np.stack([np.full((32, 48), 20 + 10 * t, np.uint8) for t in range(12)])
    u, v = (write_video(tmp_path / f"{d}.mp4", made[: 11 if d == shorter else 12]) for d in "uv")
    settings = FlowModality(frames=4, interval=interval, short_side=24, crop=24, flip=0)
    views = load(clip_of("flow", u, path_v=v), settings, [TEST_VIEW, 0])
    expected = 20 + 10 * sample_indices(11, settings, None)
    for direction in range(2):
        assert np.abs(views[0][direction, :, 0, 0] - expected).max() <= 4
    assert np.abs(views[1][0].astype(int) - views[1][1]).max() <= 4


def test_computed_flow_becomes_a_view(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), dtype=np.uint8))
    settings = FlowModality(frames=8, short_side=32, crop=32)
    test, train = load(clip_of("flow", path, computed=1), settings, [TEST_VIEW, 0])
    assert test.shape == train.shape == (2, 8, 32, 32)


# --- randomness ----------------------------------------------------------------------------------------------------


def test_views_depend_on_seed_clip_modality_and_number_only(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (16, 48, 64, 3), dtype=np.uint8)
    folder = write_frames(tmp_path / "clip", frames, suffix="png")
    clip = clip_of("video", folder)
    base = load(clip, VIDEO, [0, 1, 2, TEST_VIEW])
    again = load(clip, VIDEO, [2, TEST_VIEW, 0])
    for a, b in ((base[2], again[0]), (base[3], again[1]), (base[0], again[2])):
        np.testing.assert_array_equal(a, b)
    others = [
        base[1],
        load(clip, VIDEO, [0], seed=1)[0],
        load(clip_of("video", folder, "c1"), VIDEO, [0])[0],
        load(clip_of("other", folder), VIDEO, [0])[0],
    ]
    assert all((other != base[0]).any() for other in others)
    np.testing.assert_array_equal(load(clip, VIDEO, [TEST_VIEW], seed=9)[0], base[3])


def test_generators_do_not_collide():
    # "1" + "11" and "11" + "1" are different pairs.
    pairs = [(0, "c1", "video", 11), (0, "c11", "video", 1), (0, "c1", "video1", 1), (1, "c1", "video", 1)]
    assert len({view_generator(*pair).random() for pair in pairs}) == 4


def _in_worker(folder) -> list[np.ndarray]:
    return load(clip_of("video", folder), VIDEO, [0, 5])


def test_other_processes_make_the_same_views(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (16, 48, 64, 3), dtype=np.uint8)
    folder = write_frames(tmp_path / "clip", frames, suffix="png")
    here = _in_worker(folder)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        there = pool.submit(_in_worker, folder).result(timeout=60)
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a, b)


def test_media_are_decoded_once(tmp_path, monkeypatch):
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return read_frames(*args, **kwargs)

    monkeypatch.setattr(module, "read_frames", counting)
    folder = write_frames(tmp_path / "clip", ramp(16, 48, 64), suffix="png")
    assert len(load(clip_of("video", folder), VIDEO, [TEST_VIEW, 0, 1, 2, 3])) == 5
    assert len(calls) == 1


def test_what_was_mended_is_told(tmp_path):
    folder = write_frames(tmp_path / "clip", ramp(8, 48, 64), suffix="png")
    (folder / "frame_0000000004.png").unlink()
    notes: list[str] = []
    load_views(clip_of("video", folder), "video", VIDEO, views=[0], seed=0, dataset=DATASET, notes=notes)
    assert len(notes) == 1
    assert "1 of 8 frames are missing" in notes[0]


# --- sound ---------------------------------------------------------------------------------------------------------

AUDIO = AudioModality(samples=8000, nperseg=256, noverlap=128)


def reference_log_spectrogram(samples: np.ndarray, rate: int, size: int, overlap: int, floor: float) -> np.ndarray:
    """Power spectral density by plain numpy: Tukey window (a quarter tapered), mean removed, one-sided."""
    n = np.arange(size)
    ramp_length = 0.25 * size / 2  # periodic window: the tapers of one of length size + 1, cut
    window = np.ones(size)
    window[n < ramp_length] = 0.5 * (1 - np.cos(np.pi * n[n < ramp_length] / ramp_length))
    tail = size - ramp_length
    window[n > tail] = 0.5 * (1 + np.cos(np.pi * (n[n > tail] - tail) / ramp_length))
    columns = []
    for start in range(0, len(samples) - size + 1, size - overlap):
        piece = samples[start : start + size]
        power = np.abs(np.fft.rfft((piece - piece.mean()) * window)) ** 2 / (rate * (window**2).sum())
        power[1:-1] *= 2
        columns.append(power)
    log = np.log(np.stack(columns, axis=1) + floor)
    return (log - log.mean()) / log.std()


@pytest.mark.parametrize(("size", "overlap"), [(256, 128), (512, 353)])
def test_spectrogram(size, overlap):
    samples = np.random.default_rng(0).normal(0, 0.1, 16000) + tone(2.0)
    settings = AudioModality(samples=16000, nperseg=size, noverlap=overlap)
    got = audio_view(samples, 8000, settings, None)
    expected = reference_log_spectrogram(np.clip(samples, -1, 1), 8000, size, overlap, 1e-7)
    assert got.dtype == np.float32
    assert got.shape == (1, *expected.shape)
    np.testing.assert_allclose(got[0], expected, atol=1e-5)


def test_the_papers_spectrogram_is_257_by_1004(tmp_path):
    path = write_wav(tmp_path / "a.wav", tone(2.28))
    (got,) = load(clip_of("audio", path), AudioModality(), [TEST_VIEW])
    assert got.shape == (1, 257, 1004)
    assert AudioModality().part_shapes() == [((1, 257, 1004), np.dtype(np.float32))]
    assert got.mean() == pytest.approx(0, abs=1e-4)
    assert got.std() == pytest.approx(1, abs=1e-4)


def test_short_sounds_are_repeated_or_padded():
    short = np.linspace(-0.5, 0.5, 3000)
    repeated = fit_samples(short, AUDIO)
    np.testing.assert_allclose(repeated, np.concatenate([short, short, short[:2000]]))
    padding = AUDIO.model_copy(update={"short": "pad"})
    padded = fit_samples(short, padding)
    np.testing.assert_allclose(padded, np.concatenate([short, np.zeros(5000)]))
    np.testing.assert_allclose(fit_samples(np.full(9000, 0.1), AUDIO), np.full(8000, 0.1))
    one = fit_samples(np.array([0.25]), AUDIO)
    assert one.tolist() == [0.25] * 8000


def test_padded_training_views_begin_at_random_moments():
    settings = AUDIO.model_copy(update={"short": "pad", "shift": 0.5})
    short = np.full(3000, 0.3)
    starts = []
    for seed in range(300):
        got = fit_samples(short, settings, silence_before(len(short), settings, np.random.default_rng(seed)))
        (places,) = np.nonzero(got)
        assert len(places) == 3000
        starts.append(int(places[0]))
    assert 0 <= min(starts) < 100
    assert 2400 < max(starts) <= 2500
    assert np.nonzero(fit_samples(short, settings))[0][0] == 0


def test_levels():
    loud, quiet = tone(1.0, level=0.8), tone(1.0, level=0.008)
    for level, measure, target in (("rms", lambda x: np.sqrt((x**2).mean()), 0.1), ("peak", lambda x: abs(x).max(), 1)):
        settings = AUDIO.model_copy(update={"level": level})
        for samples in (loud, quiet):
            assert measure(fit_samples(samples, settings, None)) == pytest.approx(target, rel=1e-3)
        np.testing.assert_allclose(
            audio_view(loud, 8000, settings, None), audio_view(quiet, 8000, settings, None), atol=1e-4
        )
    kept = audio_view(loud, 8000, AUDIO, None) - audio_view(quiet, 8000, AUDIO, None)
    assert np.abs(kept).max() > 0.1  # the floor makes loudness show when levels are kept
    assert np.abs(fit_samples(5 * loud, AUDIO, None)).max() == 1.0


@pytest.mark.parametrize("level", ["keep", "rms", "peak"])
def test_silence_is_zeros(level):
    settings = AUDIO.model_copy(update={"level": level})
    assert not audio_view(np.zeros(3000), 8000, settings, None).any()
    assert not audio_view(np.full(3000, 0.2), 8000, settings, None).any()  # a constant has no spectrum
    assert np.isfinite(audio_view(np.array([0.5]), 8000, settings, np.random.default_rng(0))).all()


def test_training_noise_and_band(tmp_path):
    samples = np.random.default_rng(0).normal(0, 0.1, 8000)
    plain = audio_view(samples, 8000, AUDIO, None)[0]
    places = set()
    for seed in range(60):
        noisy = audio_view(samples, 8000, AUDIO, np.random.default_rng(seed))[0]
        masked = np.nonzero(~noisy.any(axis=1))[0]
        assert len(masked) == 9
        assert (np.diff(masked) == 1).all()
        rest = np.delete(noisy - plain, masked, axis=0)
        assert np.abs(rest).max() <= 0.05 + 1e-6
        assert np.abs(rest).max() > 0.045
        assert rest.std() == pytest.approx(0.05 / np.sqrt(3), rel=0.05)
        places.add(int(masked[0]))
    assert len(places) > 20
    off = AUDIO.model_copy(update={"noise": 0.0, "mask_bins": 0})
    np.testing.assert_array_equal(audio_view(samples, 8000, off, np.random.default_rng(0))[0], plain)


def test_resampled_sound_gives_the_same_picture(tmp_path):
    settings = AUDIO.model_copy(update={"sample_rate": 8000})
    low = write_wav(tmp_path / "low.wav", tone(1.0, rate=8000), rate=8000)
    high = write_wav(tmp_path / "high.wav", tone(1.0, rate=24000), rate=24000)
    (a,) = load(clip_of("audio", low), settings, [TEST_VIEW])
    (b,) = load(clip_of("audio", high), settings, [TEST_VIEW])
    assert a.shape == b.shape
    peak = a[0].mean(1).argmax()
    assert peak == b[0].mean(1).argmax() == round(440 / 8000 * 256)


# --- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        VideoModality(),
        VideoModality(frames=3, interval=4, short_side=70, crop=64, test_crop=70),
        FlowModality(frames=5),
        AudioModality(samples=4000, nperseg=200, noverlap=150),
        AudioModality(samples=4001, nperseg=201, noverlap=0, short="pad"),
        ArrayModality(dimension=6),
        ArrayModality(dimension=6, length=3),
    ],
)
def test_shapes_are_known_before_decoding(tmp_path, settings):
    if settings.kind == "array":
        path = write_array(tmp_path / "a.npy", np.zeros((2, 6) if settings.length else 6))
    elif settings.kind == "audio":
        path = write_wav(tmp_path / "a.wav", tone(0.3))
    else:
        path = write_video(tmp_path / "a.mp4", np.zeros((10, 48, 64, 3), np.uint8))
    clip = clip_of("x", path, computed=settings.kind == "flow")
    train, test = load(clip, settings, [0, TEST_VIEW])
    assert [(train.shape, train.dtype)] == settings.part_shapes()
    assert [(test.shape, test.dtype)] == settings.part_shapes(test=True)


def test_shapes_of_unresolved_arrays_are_an_error():
    with pytest.raises(MediaError, match="dimension"):
        ArrayModality().part_shapes()


@needs_av_digits
def test_real_clip_against_opencv():
    path = AV_DIGITS / "tilted/videos/tilted_1_10.mp4"
    (got,) = load(clip_of("video", path), VideoModality(), [TEST_VIEW])
    capture = cv2.VideoCapture(str(path))
    frames = np.stack([capture.read()[1][..., ::-1] for _ in range(16)])
    capture.release()
    expected = frames[:, 4:60, 4:60].transpose(3, 0, 1, 2)
    assert np.abs(got.astype(int) - expected).mean() < 3
