"""The records that flow through the house: where a clip's media lies, and what a batch holds.

Letters: B clips in a batch, M modalities, C classes, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # the processes that decode media need no torch: seconds of start and 280 MB each
    import torch

Parts = tuple["torch.Tensor", ...]
"""What a trunk takes and returns: a tensor [B, ...] per path of the encoder."""
SPLITS = ("train", "test")
# Fusion concatenates in this order (the reference's); other modalities follow in the order given.
MODALITY_ORDER = ("video", "audio", "flow")
TEST_VIEW = -1
"""View number of the one deterministic test view; training views count from 0."""


def modality_order(names: list[str] | tuple[str, ...]) -> list[str]:
    """`names` in fusion order: video, audio, flow, then the others as given."""
    leading = [name for name in MODALITY_ORDER if name in names]
    return leading + [name for name in names if name not in leading]


@dataclass(frozen=True, slots=True)
class Media:
    """Where one modality of one clip lies.

    Attributes:
        path: the file (or folder of frames) that holds it.
        path_v: second file of a flow pair (`path` is u / x, `path_v` is v / y).
        start, stop: span inside the file, in `unit`; None means from the beginning / to the end.
        unit: "s" (seconds), "frame" (zero-based native frames, stop exclusive), or "row": the clip is row `start` of a
            packed array.
        computed: for flow that is computed from the RGB video `path`, the frames from one picture of a pair to the
            other; 0 where flow is stored. For sound, the same of `clock`.
        rate: frames per second: for a video file with a span in seconds, or of one clip whose `frames` are counted at
            it, those on which views sample, whatever its own are; for a folder of frames, and sound whose `clock` is
            one, the folder's own, which no file tells.
        clock: for sound with a span in frames, the video whose frame times those frames have; for sound that follows
            the frames of another modality's views, that modality's file; for stored flow, the video that it was made
            of, where that tells how many frames it should have.
        frames: for a file that holds one clip, how many frames it should have by the annotation.
    """

    path: Path
    path_v: Path | None = None
    start: float | None = None
    stop: float | None = None
    unit: Literal["s", "frame", "row"] = "s"
    computed: int = 0
    clock: Path | None = None
    rate: float | None = None
    frames: int | None = None

    @property
    def source(self) -> str:
        """The file, or the row of it, as messages name it."""
        return f"{self.path}#{int(self.start or 0)}" if self.unit == "row" else str(self.path)


@dataclass(frozen=True, slots=True)
class Clip:
    """One labelled clip: an id unique in its dataset, its domain and split, and its media per modality.

    Attributes:
        group: the recording or source video that it is a part of, by the table; empty where nothing tells.
        span: its begin and end (exclusive) in that recording, in what the table counts.
    """

    id: str
    domain: str
    split: str
    label: int
    label_name: str
    media: Mapping[str, Media] = field(default_factory=dict)
    group: str = ""
    span: tuple[float, float] | None = None


@dataclass(slots=True)
class Batch:
    """What every consumer downstream of the cache sees.

    Attributes:
        inputs: per modality the tensors at the cut, one per path of the encoder (SlowFast has two), each [B, ...].
        labels: [B] int64.
        domains: [B] int64, indices into the dataset's domain list.
        clips: [B] int64, indices into the dataset's clip table.
    """

    inputs: dict[str, tuple[torch.Tensor, ...]]
    labels: torch.Tensor
    domains: torch.Tensor
    clips: torch.Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return Batch(
            inputs={
                name: tuple(part.to(device, non_blocking=non_blocking) for part in parts)
                for name, parts in self.inputs.items()
            },
            labels=self.labels.to(device, non_blocking=non_blocking),
            domains=self.domains.to(device, non_blocking=non_blocking),
            clips=self.clips.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, slots=True)
class Mended:
    """A clip that was used all the same, and what decoding mended of it: frames taken from a neighbour and the like."""

    clip: str
    note: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """One modality of one clip that could not be used, as `prepare` reports it and stores it in the cache.

    Attributes:
        clip: the clip's id.
        modality: name of the modality whose file is bad.
        file: path of that file, as the reader gave it.
        cause: what is wrong with it.
        remedy: what to do about it.
    """

    clip: str
    modality: str
    file: str
    cause: str
    remedy: str = ""


@dataclass(slots=True)
class Decoded:
    """The views of one clip, each a tuple of parts; or why there are none."""

    index: int
    views: list[int]
    parts: list[tuple[np.ndarray, ...]]
    rejected: Rejected | None = None
    notes: list[str] = field(default_factory=list)
