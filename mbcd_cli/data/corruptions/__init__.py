"""Corruptions of decoded media, severities 1 to 5: `pixels.py` for frames, `waveform.py` sound, `values.py` arrays.

A corruption keeps number, size, rate and length. What is random about it is the clip's own and the same at every
severity, which scales it. Whoever changes a formula raises `FORMULAS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from mbcd_cli.data.records import Media

FORMULAS = 1
"""Version of all formulas, in the name of every cache of corrupted views: those of others are no longer found."""
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
        """Name of the folder of its cache: fog-3-v1, of which 3 is the severity and 1 the version of the formulas."""
        return f"{self.name}-{self.severity}-v{FORMULAS}"

    @classmethod
    def of_folder(cls, name: str) -> Self | None:
        """The corruption whose cache lies in a folder of this name; None where it is none, or of other formulas."""
        stem, _, formulas = name.rpartition("-v")
        kind, _, severity = stem.rpartition("-")
        own = kind and severity in map(str, SEVERITIES) and formulas == str(FORMULAS)
        return cls(kind, int(severity)) if own else None
