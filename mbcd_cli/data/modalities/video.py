"""Video: RGB frames. Letters: N frames, H W pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from mbcd_cli.data.corruptions import Corrupt
from mbcd_cli.data.media.checks import Choose
from mbcd_cli.data.modalities.frames import FrameModality
from mbcd_cli.data.records import Media
from mbcd_cli.settings import DatasetSettings, ForWeights, Positive


class VideoModality(FrameModality):
    """RGB video."""

    channels: ClassVar[int] = 3
    words: ClassVar[tuple[str, ...]] = ("video", "rgb", "frames")
    suffixes: ClassVar[tuple[str, ...]] = (
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".flv",
        ".wmv",
        ".mpg",
        ".mpeg",
        ".ts",
        ".mts",
        ".vob",
    )
    encoder_settings: ClassVar[tuple[str, ...]] = ("frames", "short_side", "crop", "test_crop", "mean", "std")
    stated_seconds: ClassVar[float] = 0.4

    kind: Literal["video"] = "video"
    """Kind of the modality."""
    encoder: ForWeights[str] = "small-video"
    """Encoder that reads this modality; `mbcd list encoders` shows them."""
    frame_pooling: Literal["mean", "max"] = "mean"
    """How the features of single frames become a clip's, of an encoder that reads frames alone (CLIP, timm)."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of each channel (R, G, B; 0 to 255) that is subtracted."""
    std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375)
    """Standard deviation of each channel that is divided by."""

    @property
    def corruptions(self) -> Mapping[str, Corrupt]:
        """ImageNet-C's fifteen."""
        from mbcd_cli.data.corruptions.pixels import PIXELS

        return PIXELS

    def read(self, media: Media, choose: Choose, *, dataset: DatasetSettings, notes: list[str] | None) -> np.ndarray:
        """[N, H, W, 3] uint8."""
        from mbcd_cli.data.media.video import read_frames

        return read_frames(media, choose, dataset=dataset, notes=notes)
