"""What an encoder wants of one decoded view, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from mbcd_cli.settings import Count, Positive

FULL_SCALE = 255
"""Largest value of a decoded pixel."""


def _distinct(axes: str) -> str:
    if len(set(axes)) < len(axes):
        raise ValueError(f"an axis stands twice in {axes}")
    return axes


def _rows_first(axes: str) -> str:
    if axes[0] != "B":  # rows are split, joined and pooled along the first axis
        raise ValueError(f"B comes first in {axes}: clips, frames or windows are its rows")
    return axes


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError("the smallest comes first, and is not the largest")
    return ends


Letters = Annotated[str, Field(pattern="^[A-Z]+$"), AfterValidator(_distinct)]
"""A letter for every axis."""
RowLetters = Annotated[Letters, AfterValidator(_rows_first)]
"""The same, of a batch."""
STRICTLY = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """Input and output of an encoder. A field that its kind of modality does not have, or that may be any, is None.

    Letters: B clips, C channels, T frames, H W pixels, S samples, D features.

    Attributes:
        kind: of the modality whose decoded views it reads.
        axes: of the network's input as its owner lays them out, one letter each (VideoMAE: BTCHW).
        frames: T of a clip; None where every frame is encoded alone, as `per_frame` says.
        per_frame: frames are encoded one by one, and their features pooled over time.
        size: (H, W) of a frame.
        short_side: pixels of a frame's short side before the centre crop.
        colour: order of the channels.
        values: smallest and largest value after scaling, before `mean` and `std`.
        mean, std: of every channel in the order of `colour` (of the front end where sound has one), in units of
            `values`.
        sample_rate: samples per second.
        samples: S of a clip.
        front_end: what becomes of the samples before the first layer ("log-mel", "fbank", "waveform", ...).
        front_end_settings: its parameters by name.
        gives: axes of a whole model's output, D its features and the others positions (BD, BLD, BDHW).
        pooling: how tokens or positions become one vector.
        dim: D.
        licence: as the owner states it (an SPDX name, mostly).
        pretraining: the data that its weights were trained on, as the owner states it.
    """

    __pydantic_config__ = STRICTLY

    kind: Literal["video", "flow", "audio", "array"]
    axes: RowLetters
    frames: Count | None = None
    per_frame: bool = False
    size: tuple[Count, Count] | None = None
    short_side: Count | None = None
    colour: Literal["RGB", "BGR"] | None = None
    values: Annotated[tuple[float, float], AfterValidator(_ascending)] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    sample_rate: Count | None = None
    samples: Count | None = None
    front_end: str | None = None
    front_end_settings: tuple[tuple[str, str | int | float | bool | None], ...] = ()
    gives: RowLetters = "BD"
    pooling: str
    dim: Count
    licence: str | None = None
    pretraining: str | None = None

    def settings(self) -> dict[str, object]:
        """The modality's settings that say the same, by field; those that may be any are left out."""
        if self.kind == "audio":
            told = {"front_end": "waveform", "sample_rate": self.sample_rate, "samples": self.samples}
        elif self.kind == "video":
            side = self.size[0] if self.size else None
            told = {"frames": self.frames, "short_side": self.short_side or side, "crop": side, "test_crop": side}
            if self.values is not None and self.mean is not None and self.std is not None:
                # (p / 255 (high - low) + low - mean) / std, in units of the pixel p
                scale, low = FULL_SCALE / (self.values[1] - self.values[0]), self.values[0]
                order = -1 if self.colour == "BGR" else 1  # settings are of red, green and blue
                told["mean"] = tuple((mean - low) * scale for mean in self.mean)[::order]
                told["std"] = tuple(std * scale for std in self.std)[::order]
        else:
            told = {}
        return {field: value for field, value in told.items() if value is not None}
