"""Corruptions of decoded media, severities 1 to 5: `pixels.py` for frames, `waveform.py` sound, `values.py` arrays.

A corruption keeps number, size, rate and length. What is random about it is the clip's own and the same at every
severity, which scales it. Whoever changes a formula raises the format of caches (`cache.FORMAT`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from mbcd_cli.data.records import Media

SEVERITIES = (1, 2, 3, 4, 5)
Corrupt = Callable[..., np.ndarray]
"""(decoded values, severity 1 to 5, random numbers, ...) -> values of the same shape and type."""


@dataclass(frozen=True, slots=True)
class Corruption:
    """What is done to a clip's decoded media before its view is made.

    Attributes:
        name: among `Modality.corruptions`.
        severity: 1 to 5; 0 leaves the media as they are.
        others: some clips' media, of which babble takes voices.
        rng: the clip's own random numbers, given where it is decoded.
    """

    name: str
    severity: int
    others: tuple[Media, ...] = ()
    rng: np.random.Generator | None = None

    @property
    def folder(self) -> str:
        """Name of the folder of its cache: fog-3."""
        return f"{self.name}-{self.severity}"

    @classmethod
    def of_folder(cls, name: str) -> Self | None:
        """The corruption whose cache lies in a folder of this name; None where it is no such name."""
        kind, _, severity = name.rpartition("-")
        return cls(kind, int(severity)) if kind and severity in map(str, SEVERITIES) else None
