"""From a clip's media to the tensors an encoder reads: K random training views and one deterministic test view.

A file is decoded once for all views asked for. What is random about a view comes from (seed, clip id, modality, view
number) alone, so that it is the same for any number of workers and in any order.

Letters: T frames, H W pixels, F frequency bins, S spectrogram columns, D values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from mbcd_cli.data.media.arrays import read_array
from mbcd_cli.data.media.flow import read_flow
from mbcd_cli.data.media.sound import read_audio
from mbcd_cli.data.media.video import read_frames, resize_short_side, timeline_of
from mbcd_cli.data.records import TEST_VIEW, Clip, Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import (
    ArrayModality,
    AudioModality,
    DatasetSettings,
    FlowModality,
    FrameGeometry,
    Modality,
    VideoModality,
)

Parts = tuple[np.ndarray, ...]
RMS_LEVEL = 0.1
"""Root mean square to which `level = "rms"` scales a clip."""
_SILENCE = 1e-8


def load_views(
    clip: Clip,
    name: str,
    settings: Modality,
    *,
    views: Sequence[int],
    seed: int,
    dataset: DatasetSettings,
    notes: list[str] | None = None,
) -> list[Parts]:
    """The views of one modality of a clip, decoded once.

    Args:
        clip: the clip; `clip.media[name]` says where its media lies.
        name: the modality's name.
        settings: its settings.
        views: view numbers; `TEST_VIEW` is the deterministic one, others are random training views.
        seed: with the clip's id, fixes every random view.
        dataset: limits on bad media.
        notes: collects what was mended on the way (missing frames), if given.

    Returns:
        One tuple of parts per view asked for: video ([3, T, H, W] uint8,), flow ([2, T, H, W] uint8,), audio
        ([1, F, S] float32,), array ([D] or [T, D] float32,).

    Raises:
        MediaError: the file cannot be used.
    """
    media = clip.media[name]
    generators = [None if view == TEST_VIEW else view_generator(seed, clip.id, name, view) for view in views]
    if isinstance(settings, VideoModality | FlowModality):
        return _frame_views(media, settings, generators, dataset=dataset, notes=notes)
    if isinstance(settings, AudioModality):
        spans = [media] * len(views)
        follows = settings.follow is not None and media.clock is not None
        if follows:
            guides = [
                None if view == TEST_VIEW else view_generator(seed, clip.id, settings.follow, view) for view in views
            ]
            spans = followed_spans(media, settings, guides, dataset=dataset)
        sounds = {
            span: read_audio(
                span,
                sample_rate=settings.sample_rate,
                limit=settings.samples,
                dataset=dataset,
                notes=notes,
                silent_end=follows,
            )
            for span in dict.fromkeys(spans)
        }
        shared: dict[Media, dict[int, np.ndarray]] = {span: {} for span in sounds}
        return [
            (audio_view(*sounds[span], settings, rng, shared[span]),)
            for span, rng in zip(spans, generators, strict=True)
        ]
    array = _shaped(read_array(media, notes), settings, media)
    if settings.length is not None and settings.fit == "pad" and len(array) > settings.length and notes is not None:
        notes.append(f"{media.path}: {len(array)} steps, cut to the first {settings.length}")
    return [(_noisy(_fit(array, settings, rng), settings, rng),) for rng in generators]


def view_generator(seed: int, clip: str, name: str, view: int) -> np.random.Generator:
    """The random numbers of one view; independent of process, order and machine."""
    digest = hashlib.sha256("\0".join((str(seed), clip, name, str(view))).encode()).digest()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "big"))))


def part_shapes(settings: Modality, *, test: bool = False) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each part of a view, known without media.

    Args:
        settings: resolved settings (`survey.resolve`).
        test: of the test view, which differs from a training view where `test_crop` is set.

    Raises:
        MediaError: the dimension of an array modality is not known yet.
    """
    if isinstance(settings, FrameGeometry):
        channels = 3 if isinstance(settings, VideoModality) else 2
        side = _crop_side(settings, test)
        return [((channels, settings.frames, side, side), np.dtype(np.uint8))]
    if isinstance(settings, AudioModality):
        hop = settings.nperseg - settings.noverlap
        columns = (settings.samples - settings.noverlap) // hop
        return [((1, settings.nperseg // 2 + 1, columns), np.dtype(np.float32))]
    if settings.dimension is None:
        raise MediaError("an array modality", "its dimension is not known", "Set modalities.NAME.dimension=D.")
    steps = () if settings.length is None else (settings.length,)
    return [((*steps, settings.dimension), np.dtype(np.float32))]


# --- frames --------------------------------------------------------------------------------------------------------


def sample_indices(count: int, settings: FrameGeometry, rng: np.random.Generator | None) -> np.ndarray:
    """Which frames of a clip of `count` frames a view takes: [T] indices, ascending where the clip is long enough.

    `interval` 0 cuts the clip into T equal segments and takes the middle of each (a random moment of it in training);
    `interval` n takes T frames n apart from the middle of the clip (from a random start in training), and begins
    again at the first frame where the clip is shorter. They take up (T - 1) n + 1 frames as MMAction2 1 counts, and
    T n as the reference's MMAction2 0 does, which also rounds the middle up.
    """
    wanted, interval = settings.frames, settings.interval
    if interval == 0:
        return _spread(count, wanted, rng)
    reference = settings.sampling == "reference"
    room = count - (wanted * interval if reference else (wanted - 1) * interval + 1)
    if room <= 0:
        start = 0
    elif rng is None:
        start = (room + 1) // 2 if reference else room // 2
    else:
        start = int(rng.integers(room + 1))
    return (start + interval * np.arange(wanted)) % count


def _spread(count: int, wanted: int, rng: np.random.Generator | None) -> np.ndarray:
    """The middle of each of `wanted` equal segments of `count` places, or a random place of it: [wanted] ascending."""
    offsets = np.full(wanted, 0.5) if rng is None else rng.random(wanted)
    return np.minimum(((np.arange(wanted) + offsets) * count / wanted).astype(np.int64), count - 1)


def _frames_to_sample(count: int, settings: FrameGeometry, media: Media) -> int:
    """Of a clip of `count` frames; the reference's loaders leave out the last frame of a file that holds one clip."""
    one_clip = media.start is None and media.stop is None and not media.path.is_dir()
    return max(count - 1, 1) if settings.sampling == "reference" and one_clip else count


def crop_box(height: int, width: int, settings: FrameGeometry, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random training crop: area and log-aspect uniform in their ranges.

    After ten boxes that do not fit, the centre square is taken (as mmaction2's RandomResizedCrop does).
    """
    log_aspect = np.log(settings.crop_aspect)
    for _ in range(10):
        area = rng.uniform(*settings.crop_area) * height * width
        aspect = float(np.exp(rng.uniform(*log_aspect)))
        box_width, box_height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _crop_side(settings: FrameGeometry, test: bool) -> int:
    return (settings.test_crop or settings.crop) if test else settings.crop


def _frame_views(
    media: Media,
    settings: VideoModality | FlowModality,
    generators: Sequence[np.random.Generator | None],
    *,
    dataset: DatasetSettings,
    notes: list[str] | None,
) -> list[Parts]:
    picks: list[np.ndarray] = []

    def choose(count: int) -> np.ndarray:
        count = _frames_to_sample(count, settings, media)
        picks[:] = [sample_indices(count, settings, rng) for rng in generators]
        return np.unique(np.concatenate(picks))

    if isinstance(settings, VideoModality):
        frames = read_frames(media, _once(choose), dataset=dataset, notes=notes)
    else:
        frames = read_flow(
            media,
            _once(choose),
            dataset=dataset,
            bound=settings.flow_bound,
            short_side=settings.short_side,
            notes=notes,
        )
    frames = resize_short_side(frames, settings.short_side)
    known = np.unique(np.concatenate(picks))
    return [
        (_geometry(frames, np.searchsorted(known, pick), settings, rng),)
        for pick, rng in zip(picks, generators, strict=True)
    ]


def _once(choose):
    """Draws once, however often it is asked (a flow pair asks for each of its two files)."""
    memory: dict[int, np.ndarray] = {}

    def asked(count: int) -> np.ndarray:
        if count not in memory:
            memory[count] = choose(count)
        return memory[count]

    return asked


def _geometry(
    frames: np.ndarray,
    pick: np.ndarray,
    settings: VideoModality | FlowModality,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """[N, H, W, C] and the places of T of them -> [C, T, side, side]."""
    height, width = frames.shape[1:3]
    side = _crop_side(settings, rng is None)
    top, left, box_height, box_width, mirrored = (height - side) // 2, (width - side) // 2, side, side, False
    if rng is not None:
        top, left, box_height, box_width = crop_box(height, width, settings, rng)
        mirrored = rng.random() < settings.flip
    out = np.empty((frames.shape[3], len(pick), side, side), frames.dtype)
    # Frame by frame, each in the processor's cache from the crop to the planes.
    for moment, place in enumerate(pick):
        frame = frames[place, top : top + box_height, left : left + box_width]
        if (box_height, box_width) != (side, side):
            frame = cv2.resize(frame, (side, side), interpolation=cv2.INTER_LINEAR)
        if mirrored:
            frame = cv2.flip(frame, 1)
        for channel, plane in zip(out, cv2.split(frame), strict=True):
            channel[moment] = plane
    if mirrored and isinstance(settings, FlowModality):
        out[0] = 255 - out[0]  # what moved to the right now moves to the left
    return out


# --- sound ---------------------------------------------------------------------------------------------------------


def followed_spans(
    media: Media,
    settings: AudioModality,
    guides: Sequence[np.random.Generator | None],
    *,
    dataset: DatasetSettings,
) -> list[Media]:
    """Per view, the sound between the first and the last frame that the view of the video `media.clock` samples.

    Args:
        media: sound with its video as `clock`.
        settings: `follow_frames`, ... as the video samples, and the rate that gives frames times.
        guides: the video views' own random numbers, of which sampling draws the first; None for the test view.
        dataset: limits on bad media.
    """
    count = len(timeline_of(media.clock)) - media.computed  # flow lies between frames
    sampling = VideoModality(
        frames=settings.follow_frames, interval=settings.follow_interval, sampling=settings.follow_sampling
    )
    count = _frames_to_sample(count, sampling, Media(media.clock))
    spans = []
    for rng in guides:
        pick = sample_indices(count, sampling, rng)
        start, stop = float(pick[0]) / settings.follow_rate, float(pick[-1]) / settings.follow_rate
        # In a clip shorter than what is sampled the last frame may come before the first: then all is heard.
        ends = {"start": start, "stop": stop} if stop > start else {"start": None, "stop": None}
        spans.append(replace(media, unit="s", clock=None, computed=0, **ends))
    return spans


def fit_samples(samples: np.ndarray, settings: AudioModality, rng: np.random.Generator | None) -> np.ndarray:
    """Level, length and range of a clip's sound: [n] -> [`samples`] float64 within [-1, 1]."""
    return _fit_at(samples, settings, _silence_before(len(samples), settings, rng))


def _silence_before(count: int, settings: AudioModality, rng: np.random.Generator | None) -> int:
    """Samples of silence that a view puts before a clip of `count` samples."""
    room = settings.samples - count
    if rng is None or room <= 0 or settings.short == "repeat" or settings.shift == 0:
        return 0
    return min(int(rng.random() * settings.shift * (room + 1)), room)


def _fit_at(samples: np.ndarray, settings: AudioModality, before: int) -> np.ndarray:
    taken = samples[: settings.samples].astype(np.float64)
    if settings.level != "keep":
        loudness = np.sqrt(np.mean(taken**2)) if settings.level == "rms" else np.abs(taken).max()
        if loudness > _SILENCE:
            taken = taken * ((RMS_LEVEL if settings.level == "rms" else 1.0) / loudness)
    room = settings.samples - len(taken)
    if settings.short == "repeat":
        taken = np.resize(taken, settings.samples)
    elif room:
        taken = np.pad(taken, (before, room - before))
    return np.clip(taken, -1.0, 1.0)


def audio_view(
    samples: np.ndarray,
    rate: int,
    settings: AudioModality,
    rng: np.random.Generator | None,
    shared: dict[int, np.ndarray] | None = None,
) -> np.ndarray:
    """Log-spectrogram of a clip, standardised: [n] samples at `rate` per second -> [1, F, S] float32.

    F = nperseg / 2 + 1, S = (samples - noverlap) // (nperseg - noverlap). A training view (`rng` given) then has
    uniform noise added, and one band of `mask_bins` frequency bins set to zero, the mean (method.md section 4).
    `shared` keeps what the views of the same samples have in common, if given.
    """
    shared = {} if shared is None else shared
    before = _silence_before(len(samples), settings, rng)
    if before not in shared:
        shared[before] = _spectrogram(_fit_at(samples, settings, before), rate, settings)
    return _noisy_spectrogram(shared[before], settings, rng)[None].astype(np.float32)


def _spectrogram(fitted: np.ndarray, rate: int, settings: AudioModality) -> np.ndarray:
    """[samples] -> [F, S], logarithmic, of mean 0 and standard deviation 1."""
    from scipy.signal import spectrogram

    _, _, power = spectrogram(fitted, rate, nperseg=settings.nperseg, noverlap=settings.noverlap)
    log = np.log(power + settings.log_floor)
    spread = log.std()
    # Silence has the floor everywhere: it becomes zeros, not rounding noise blown up to unit variance.
    return (log - log.mean()) / spread if spread > 1e-6 else np.zeros_like(log)


def _noisy_spectrogram(view: np.ndarray, settings: AudioModality, rng: np.random.Generator | None) -> np.ndarray:
    if rng is None:
        return view
    noise = rng.uniform(-settings.noise, settings.noise, view.shape) if settings.noise else 0.0
    view = view + noise
    if settings.mask_bins:
        bins = min(settings.mask_bins, len(view))
        low = int(rng.integers(len(view) - bins + 1))
        view[low : low + bins] = 0.0
    return view


# --- arrays --------------------------------------------------------------------------------------------------------


def _shaped(array: np.ndarray, settings: ArrayModality, media: Media) -> np.ndarray:
    """An array of the shape that the settings promise, but for its length: [D] or [T, D]."""
    wanted = f"[{settings.dimension}]" if settings.length is None else f"[T, {settings.dimension}]"
    if settings.length is not None and array.ndim == 1 and settings.dimension == 1:
        array = array[:, None]
    dims = 1 if settings.length is None else 2
    if array.ndim != dims or (settings.dimension is not None and array.shape[-1] != settings.dimension):
        raise MediaError(
            media.path,
            f"shape {list(array.shape)} where {wanted} is expected",
            "Store all files of a modality alike, or set modalities.NAME.dimension and .length.",
        )
    return array


def _fit(array: np.ndarray, settings: ArrayModality, rng: np.random.Generator | None) -> np.ndarray:
    """[T, D] -> [`length`, D], as `fit` says; a vector [D] as it is."""
    if settings.length is None:
        return array
    if settings.fit == "sample":
        return array[_spread(len(array), settings.length, rng)]
    return np.pad(array[: settings.length], ((0, max(settings.length - len(array), 0)), (0, 0)))


def _noisy(array: np.ndarray, settings: ArrayModality, rng: np.random.Generator | None) -> np.ndarray:
    if rng is None or not settings.noise:
        return array
    return array + rng.normal(0.0, settings.noise, array.shape).astype(np.float32)
