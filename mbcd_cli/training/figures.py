"""The figures of a step as one vector, and back: what is logged without waiting for the device.

Letters: M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mbcd_cli.errors import SettingsError

Record = dict[str, float | dict[str, dict[str, float]]]
"""Scalars by name, and under `modalities` a dict of figures per modality."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a vector of figures holds.

    Attributes:
        scalars: names of the figures [], which come first.
        rows: names of the figures [M], which follow.
        modalities: their M names.
    """

    scalars: tuple[str, ...]
    rows: tuple[str, ...]
    modalities: tuple[str, ...]

    @classmethod
    def of(cls, figures: Mapping[str, torch.Tensor], modalities: Sequence[str]) -> Layout:
        """The layout of a step's figures.

        Raises:
            SettingsError: a figure is neither [] nor [M].
        """
        count = len(modalities)
        for name, value in figures.items():
            if value.shape not in ((), (count,)):
                raise SettingsError(
                    f"The method's figure (or term of the loss) {name!r} has the shape {list(value.shape)}, neither [] "
                    f"nor [{count}], a value for each modality.",
                    "Take its mean over the rest.",
                )
        scalars = tuple(name for name, value in figures.items() if value.dim() == 0)
        return cls(scalars, tuple(name for name in figures if name not in scalars), tuple(modalities))

    def pack(self, figures: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One vector, [scalars + rows M]."""
        parts = [figures[name] for name in self.rows]
        if self.scalars:
            parts.insert(0, torch.stack([figures[name] for name in self.scalars]))
        return torch.cat(parts)

    def unpack(self, vector: Sequence[float]) -> Record:
        """A vector (or a mean of several) as a record."""
        count, values = len(self.modalities), list(vector)
        record: Record = dict(zip(self.scalars, values, strict=False))
        rest = values[len(self.scalars) :]
        record["modalities"] = {
            modality: {name: rest[row * count + k] for row, name in enumerate(self.rows)}
            for k, modality in enumerate(self.modalities)
        }
        return record
