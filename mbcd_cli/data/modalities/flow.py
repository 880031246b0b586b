"""Optical flow, stored in one file or two, or computed from video.

Letters: C channels, N frames decoded, T frames of a view, H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from mbcd_cli.data.corruptions import Corrupt
from mbcd_cli.data.media.checks import Choose
from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.frames import FrameModality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings, ForWeights, Positive

# How the second direction of a flow pair is named from the first, on the whole path.
_PAIRS = (
    (r"_flow_x(?=\.[^./]+$|$)", "_flow_y"),
    (r"_u(?=\.[^./]+$|$)", "_v"),
    (r"_x(?=\.[^./]+$|$)", "_y"),
    (r"(^|/)u(?=/|$)", r"\1v"),
)


class FlowModality(FrameModality):
    """Optical flow as two grey channels (u, v), 128 being no motion."""

    channels: ClassVar[int] = 2
    words: ClassVar[tuple[str, ...]] = ("flow",)
    also_in: ClassVar[tuple[str, ...]] = (*VideoModality.suffixes, *ArrayModality.suffixes)
    computed_from: ClassVar[str | None] = "video"

    kind: Literal["flow"] = "flow"
    """Kind of the modality."""
    encoder: ForWeights[str] = "small-flow"
    """Encoder that reads this modality; `mbcd list encoders` shows them."""
    mean: float = 128.0
    """Mean that is subtracted from both channels."""
    std: Positive = 128.0
    """Value that both channels are divided by."""
    flow_bound: Positive = 20.0
    """Computed flow is clipped to this many pixels per frame and mapped to 0..255 (128 is no motion)."""

    @property
    def corruptions(self) -> Mapping[str, Corrupt]:
        """Those of frames that mean something where channels are no colours."""
        from mbcd_cli.data.corruptions.pixels import FLOW_PIXELS

        return FLOW_PIXELS

    def read(self, media: Media, choose: Choose, *, dataset: DatasetSettings, notes: list[str] | None) -> np.ndarray:
        """[N, H, W, 2] uint8."""
        from mbcd_cli.data.media.flow import read_flow

        return read_flow(media, choose, dataset=dataset, bound=self.flow_bound, short_side=self.short_side, notes=notes)

    def mirrored(self, view: np.ndarray) -> np.ndarray:
        """What moved to the right now moves to the left: [C, T, H, W], changed in place."""
        view[0] = 255 - view[0]
        return view

    @classmethod
    def cell_files(cls, cell: str) -> list[str]:
        """`u|v`, one .npy, the first of a pair named by a rule, or a folder with u and v."""
        if "|" in cell:
            return [part.strip() for part in cell.split("|")]
        if not cell or cell.lower().endswith(".npy"):
            return [cell]
        for pattern, other in _PAIRS:
            matches = list(re.finditer(pattern, cell))
            if matches:
                last = matches[-1]
                return [cell, cell[: last.start()] + last.expand(other) + cell[last.end() :]]
        return [f"{cell}/u", f"{cell}/v"]

    @classmethod
    def may_hold(cls, paths: Sequence[Path]) -> bool:
        """Arrays are flow where the first that can be read is [T, H, W, 2]."""
        from mbcd_cli.data.media.arrays import load_npy

        for path in paths:
            if path.suffix.lower() in ArrayModality.suffixes:
                try:
                    return load_npy(path).ndim == 4
                except MediaError:
                    continue
        return True
