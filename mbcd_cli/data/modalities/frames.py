"""What video and flow share: which frames of a clip a view takes, and their geometry.

Letters: N frames decoded, T frames of a view, H W pixels, C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from mbcd_cli.data.corruptions import Corruption
from mbcd_cli.data.media.checks import Choose
from mbcd_cli.data.modalities.modality import Draws, Modality, ViewParts, spread_places
from mbcd_cli.data.records import Media
from mbcd_cli.settings import Count, DatasetSettings, Fraction, Positive, Role, Slice


class FrameSampling(Slice):
    """Which frames of a clip a view takes."""

    role: ClassVar[Role] = "cache"

    frames: Count = 16
    """Frames given to the encoder."""
    interval: Annotated[int, Field(ge=0)] = 0
    """Native frames between two sampled ones; 0 spreads the frames evenly over the whole clip."""
    sampling: Literal["centred", "reference"] = "centred"
    """Where frames at an interval lie: centred (MMAction2 1), or as the reference has them (MMAction2 0)."""


class FrameModality(FrameSampling, Modality):
    """Frame sampling and geometry."""

    channels: ClassVar[int]
    framed: ClassVar[bool] = True
    short_side: Count = 64
    """Pixels of the short side after the first resize."""
    resize: Literal["linear", "cubic"] = "linear"
    """How pixels of that resize are made (OpenCV's INTER_LINEAR and INTER_CUBIC)."""
    crop: Count = 56
    """Pixels of the square crop given to the encoder."""
    test_crop: Count | None = None
    """Pixels of the centre crop of the test view; default: the same as `crop`."""
    crop_area: tuple[Fraction, Fraction] = (0.6, 1.0)
    """Range of the area of the random training crop, as a fraction of the frame."""
    crop_aspect: tuple[Positive, Positive] = (0.8, 1.25)
    """Range of the aspect ratio (width over height) of the random training crop."""
    flip: Fraction = 0.5
    """Probability that a training view is mirrored (the sign of horizontal flow follows)."""

    @field_validator("crop_area", "crop_aspect")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1] or value[0] <= 0:
            raise ValueError("the two ends must be positive and in ascending order")
        return value

    @model_validator(mode="after")
    def _crop_fits(self):
        for size in (self.crop, self.test_crop or self.crop):
            if size > self.short_side:
                raise ValueError(f"a crop of {size} pixels does not fit a short side of {self.short_side}")
        return self

    @classmethod
    def decoder(cls) -> str:
        """PyAV of videos, OpenCV of folders of pictures, which makes sizes and flow too."""
        import cv2

        from mbcd_cli.data.media.timeline import DECODER

        return f"{DECODER}, OpenCV {cv2.__version__}"

    def warnings(self, media: Sequence[Media], *, name: str) -> list[str]:
        """Of folders that count from different numbers."""
        from mbcd_cli.data.media.folders import counting_differs

        text = counting_differs(media)
        return [f"{name}: {text}"] if text else []

    @abstractmethod
    def read(self, media: Media, choose: Choose, *, dataset: DatasetSettings, notes: list[str] | None) -> np.ndarray:
        """The frames [N, H, W, C] uint8 that `choose` picks, given how many there are.

        Raises:
            MediaError: the file cannot be used.
        """

    def mirrored(self, view: np.ndarray) -> np.ndarray:
        """A view [C, T, H, W] of which the pixels were mirrored already, with what else that changes."""
        return view

    def side(self, test: bool) -> int:
        """Pixels of the crop of the test view, or of a training view."""
        return (self.test_crop or self.crop) if test else self.crop

    def part_shapes(self, *, test: bool = False) -> list[tuple[tuple[int, ...], np.dtype]]:
        """One part: [C, T, side, side] uint8."""
        side = self.side(test)
        return [((self.channels, self.frames, side, side), np.dtype(np.uint8))]

    def views(
        self,
        media: Media,
        name: str,
        draws: Draws,
        *,
        dataset: DatasetSettings,
        notes: list[str] | None,
        corruption: Corruption | None = None,
    ) -> list[ViewParts]:
        """One part per view: [C, T, side, side] uint8."""
        from mbcd_cli.data.media.video import resize_short_side

        generators = draws(name)
        # By the count of frames: a flow pair asks for each of its two files, and last for what both have.
        picks: dict[int, list[np.ndarray]] = {}
        asked = 0

        def choose(count: int) -> np.ndarray:
            nonlocal asked
            asked = count
            if count not in picks:
                usable = frames_to_sample(count, self, media)
                picks[count] = [sample_indices(usable, self, rng) for rng in generators]
            return np.unique(np.concatenate(picks[count]))

        frames = resize_short_side(self.read(media, choose, dataset=dataset, notes=notes), self.short_side, self.resize)
        frames = self.corrupted(frames, corruption)
        chosen = picks[asked]
        decoded = np.unique(np.concatenate(chosen))
        return [
            (self._geometry(frames, np.searchsorted(decoded, pick), rng),)
            for pick, rng in zip(chosen, generators, strict=True)
        ]

    def _geometry(self, frames: np.ndarray, pick: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """[N, H, W, C] and the places of T of them -> [C, T, side, side]."""
        import cv2

        height, width = frames.shape[1:3]
        side = self.side(rng is None)
        top, left, box_height, box_width, mirror = (height - side) // 2, (width - side) // 2, side, side, False
        if rng is not None:
            top, left, box_height, box_width = crop_box(height, width, self, rng)
            mirror = rng.random() < self.flip
        view = np.empty((frames.shape[3], len(pick), side, side), frames.dtype)
        # Frame by frame, each in the processor's cache from the crop to the planes.
        for moment, place in enumerate(pick):
            frame = frames[place, top : top + box_height, left : left + box_width]
            if (box_height, box_width) != (side, side):
                frame = cv2.resize(frame, (side, side), interpolation=cv2.INTER_LINEAR)
            if mirror:
                frame = cv2.flip(frame, 1)
            for channel, plane in zip(view, cv2.split(frame), strict=True):
                channel[moment] = plane
        return self.mirrored(view) if mirror else view


def sample_indices(count: int, sampling: FrameSampling, rng: np.random.Generator | None) -> np.ndarray:
    """Which frames of a clip of `count` frames a view takes: [T] indices, ascending where the clip is long enough.

    `interval` 0 cuts the clip into T equal segments and takes the middle of each (a random moment of it in training);
    `interval` n takes T frames n apart from the middle of the clip (from a random start in training), and begins
    again at the first frame where the clip is shorter. They take up (T - 1) n + 1 frames as MMAction2 1 counts, and
    T n as the reference's MMAction2 0 does, which also rounds the middle up.
    """
    wanted, interval = sampling.frames, sampling.interval
    if interval == 0:
        return spread_places(count, wanted, rng)
    reference = sampling.sampling == "reference"
    room = count - (wanted * interval if reference else (wanted - 1) * interval + 1)
    if room <= 0:
        start = 0
    elif rng is None:
        start = (room + 1) // 2 if reference else room // 2
    else:
        start = int(rng.integers(room + 1))
    return (start + interval * np.arange(wanted)) % count


def frames_to_sample(count: int, sampling: FrameSampling, media: Media) -> int:
    """Of a clip of `count` frames; the reference's loaders leave out the last frame of a file that holds one clip."""
    one_clip = media.start is None and media.stop is None and not media.path.is_dir()
    return max(count - 1, 1) if sampling.sampling == "reference" and one_clip else count


def crop_box(height: int, width: int, modality: FrameModality, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random training crop: area and log-aspect uniform in their ranges.

    After ten boxes that do not fit, the centre square is taken (as mmaction2's RandomResizedCrop does).
    """
    log_aspect = np.log(modality.crop_aspect)
    for _ in range(10):
        area = rng.uniform(*modality.crop_area) * height * width
        aspect = float(np.exp(rng.uniform(*log_aspect)))
        box_width, box_height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side
