"""Corruptions of plain arrays: vectors [D] and sequences [T, D]."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mbcd_cli.data.corruptions import Corrupt


def _noise(values: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise at a ratio in dB to the standard deviation of the clip's own values."""
    spread = values.std() * 10 ** (-(10.0, 5.0, 0.0, -5.0, -10.0)[severity - 1] / 20)
    return (values + spread * rng.standard_normal(values.shape)).astype(values.dtype)


def _value_drop(values: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A share of the values, at random, is zero."""
    return np.where(rng.random(values.shape) < (0.1, 0.25, 0.5, 0.7, 0.9)[severity - 1], 0, values).astype(values.dtype)


VALUES: Mapping[str, Corrupt] = {"noise": _noise, "value-drop": _value_drop}
"""Name -> corruption of real numbers."""
