"""Plain tensors: one .npy file a clip, or one row of a packed .npy of many.

Letters: N rows, T steps, D values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from mbcd_cli.data.corruptions import Corrupt, Corruption
from mbcd_cli.data.modalities.modality import Draws, Modality, ViewParts, each_file, spread_places
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import Count, DatasetSettings, ForWeights, NonNegative

_FAR = 10.0
"""Mean, spread or its inverse from which on a column counts as not standardised."""
_LOOKED_AT = 64


class ArrayModality(Modality):
    """A plain tensor per clip (.npy): a vector [D], or a sequence [T, D]; or a row (#0, #1, ...) of a packed .npy."""

    words: ClassVar[tuple[str, ...]] = ("array", "tensor", "features")
    suffixes: ClassVar[tuple[str, ...]] = (".npy",)
    spanned: ClassVar[bool] = False
    raw: ClassVar[bool] = True
    stated_seconds: ClassVar[float] = 0.002

    kind: Literal["array"] = "array"
    """Kind of the modality."""
    encoder: ForWeights[str] = "array-mlp"
    """Encoder that reads this modality; `mbcd list encoders` shows them."""
    length: Count | None = None
    """Steps of every sequence; default: those of the longest file. Vectors have none."""
    fit: Literal["pad", "sample"] = "pad"
    """How a sequence gets to `length`: cut or padded with zeros at its end, or sampled at `length` even moments."""
    dimension: Count | None = None
    """Values per vector or step; default: read from the first file."""
    whole: bool = False
    """Values are whole numbers (identities of tokens, say), cached as they are for an encoder that reads int32."""
    noise: NonNegative = 0.0
    """Training views get Gaussian noise of this standard deviation added."""

    @model_validator(mode="after")
    def _whole_has_no_noise(self):
        if self.whole and self.noise:
            raise ValueError("whole numbers take no noise: set noise to 0")
        return self

    @classmethod
    def cell_files(cls, cell: str) -> list[str]:
        """One file, without the row that the cell may name."""
        return [_in_cell(cell)[0]]

    @classmethod
    def cell_row(cls, cell: str) -> str | None:
        """What stands behind `.npy#`."""
        return _in_cell(cell)[1]

    def part_shapes(self, *, test: bool = False) -> list[tuple[tuple[int, ...], np.dtype]]:
        """One part: [D] or [T, D], float32 or int32.

        Raises:
            MediaError: the dimension is not known yet.
        """
        if self.dimension is None:
            raise MediaError("an array modality", "its dimension is not known", "Set modalities.NAME.dimension=D.")
        steps = () if self.length is None else (self.length,)
        return [((*steps, self.dimension), np.dtype(np.int32 if self.whole else np.float32))]

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
        """One part per view: [D] or [T, D], float32 or int32."""
        from mbcd_cli.data.media.arrays import read_array

        array = self._shaped(read_array(media, notes, whole=self.whole), media)
        if notes is not None and self.length is not None and self.fit == "pad" and len(array) > self.length:
            notes.append(f"{media.source}: {len(array)} steps, cut to the first {self.length}")
        array = self.corrupted(array, corruption)
        drawn = draws(name)
        if not self.random:
            return [(self._fit(array, None),)] * len(drawn)
        return [(self._noisy(self._fit(array, rng), rng),) for rng in drawn]

    @property
    def corruptions(self) -> Mapping[str, Corrupt]:
        """None of whole numbers, which are names."""
        from mbcd_cli.data.corruptions.values import VALUES

        return {} if self.whole else VALUES

    @property
    def random(self) -> bool:
        """Whether noise is added, or moments are sampled."""
        return bool(self.noise) or (self.length is not None and self.fit == "sample")

    def _shaped(self, array: np.ndarray, media: Media) -> np.ndarray:
        """An array of the shape that the settings promise, but for its length: [D] or [T, D]."""
        wanted = f"[{self.dimension}]" if self.length is None else f"[T, {self.dimension}]"
        if self.length is not None and array.ndim == 1 and self.dimension == 1:
            array = array[:, None]
        dims = 1 if self.length is None else 2
        if array.ndim != dims or (self.dimension is not None and array.shape[-1] != self.dimension):
            alike = "Store all files of a modality alike, or set modalities.NAME.dimension and .length."
            packed = "Of an array of many clips the manifest names rows: FILE.npy#0."
            raise MediaError(
                media.source,
                f"shape {list(array.shape)} where {wanted} is expected",
                packed if array.ndim == dims + 1 else alike,
            )
        return array

    def _fit(self, array: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """[T, D] -> [`length`, D], as `fit` says; a vector [D] as it is."""
        if self.length is None:
            return array
        if self.fit == "sample":
            return array[spread_places(len(array), self.length, rng)]
        return np.pad(array[: self.length], ((0, max(self.length - len(array), 0)), (0, 0)))

    def _noisy(self, array: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        if rng is None or not self.noise:
            return array
        return array + rng.normal(0.0, self.noise, array.shape).astype(np.float32)

    def resolve(self, media: Sequence[Media], *, name: str = "NAME", notes: list[str] | None = None) -> Self:
        """With the dimension and, of sequences, the length of the longest, where they are not set."""
        from mbcd_cli.data.media.arrays import clip_shape

        if self.dimension and self.length:
            return self
        shape, error = _first_shape(media)
        if not shape:
            if error is not None and self.dimension is None:
                raise error
            return self
        if len(shape) == 1:
            return self.model_copy(update={"dimension": self.dimension or (1 if self.length else shape[0])})
        dimension = self.dimension or shape[1]
        length = self.length
        if length is None:
            # Of a packed array one clip tells for all.
            items = list(
                {item.path if item.unit == "row" else index: item for index, item in enumerate(media)}.values()
            )
            shapes = each_file(clip_shape, items)
            steps = [shape[0] for shape in shapes if shape is not None and shape[1:] == (dimension,) and shape[0]]
            length = max(steps, default=shape[0])
            if notes is not None and steps and min(steps) < length:
                how = "padded with zeros to" if self.fit == "pad" else "each spread over"
                notes.append(
                    f"{name}: sequences of {min(steps)} to {length} steps, {how} {length}; "
                    f"modalities.{name}.length sets another length, modalities.{name}.fit how they get there"
                )
        return self.model_copy(update={"dimension": dimension, "length": length})

    def warnings(self, media: Sequence[Media], *, name: str) -> list[str]:
        """Of columns far from mean 0 and spread 1: nothing standardises arrays. A sample of the files tells."""
        if self.whole or not (rows := _sample(media)):
            return []
        values = np.concatenate(rows)
        mean, spread = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
        off = (spread > 0) & ((abs(mean) > _FAR) | (spread > _FAR) | (spread < 1 / _FAR))
        if not off.any():
            return []
        worst = int(np.argmax(np.where(off, abs(np.log(np.where(off, spread, 1))) + abs(mean), -1)))
        return [
            f"{name}: {int(off.sum())} of {off.size} columns are far from mean 0 and spread 1 (column {worst}: mean "
            f"{mean[worst]:.3g}, spread {spread[worst]:.3g}), and nothing standardises them; do so where they are made"
        ]


def _in_cell(cell: str) -> tuple[str, str | None]:
    """The file and the row that a cell names: features/studio.npy#1234."""
    file, mark, row = cell.rpartition(".npy#")
    return (file + ".npy", row) if mark else (cell, None)


def _sample(media: Sequence[Media]) -> list[np.ndarray]:
    """Rows [T, D] of a few files, spread evenly; those that cannot be read, or have another width, are left out."""
    from mbcd_cli.data.media.arrays import read_array

    rows: list[np.ndarray] = []
    for item in media[:: -(-len(media) // _LOOKED_AT) or 1]:
        with suppress(MediaError):
            sequence = np.atleast_2d(read_array(item))
            rows += [sequence] if not rows or sequence.shape[1] == rows[0].shape[1] else []
    return rows


def _first_shape(media: Sequence[Media]) -> tuple[tuple[int, ...], MediaError | None]:
    """Shape of the first array that can be read; else (), and why the first cannot."""
    from mbcd_cli.data.media.arrays import read_array

    first: MediaError | None = None
    for item in media:
        try:
            return read_array(item).shape, None
        except MediaError as error:
            first = first or error
    return (), first
