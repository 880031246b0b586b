"""Eight bits per value: int8 with one scale per row and channel, symmetric around zero.

Letters: R rows, C channels.
"""

from __future__ import annotations

import numpy as np

LEVELS = 127
"""Largest stored magnitude: -127 to 127, so that zero stays zero (after a ReLU most values are)."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a row of `shape` [C, ...]: [C]; a plain vector [D] has a single scale, []."""
    return shape[:1] if len(shape) > 1 else ()


def quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[R, C, ...] floats -> (int8 of the same shape, scales [R, C] float32); value = int8 x scale.

    A channel's scale is its largest magnitude / 127, so no value is off by more than half a scale.
    """
    rows = np.asarray(rows, np.float32)
    axes = tuple(range(1 + len(scale_shape(rows.shape[1:])), rows.ndim))
    scales = np.abs(rows).max(axis=axes, initial=0.0, keepdims=True) / LEVELS
    divisor = np.where(scales > 0, scales, 1.0).astype(np.float32)
    return np.rint(rows / divisor).astype(np.int8), scales.reshape(scales.shape[: rows.ndim - len(axes)])


def restore(rows: np.ndarray, scales: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """What `quantise` stored, as float32 [R, C, ...]."""
    return np.multiply(rows, scales.reshape(scales.shape + (1,) * (rows.ndim - scales.ndim)), out=out, dtype=np.float32)


def squared_error(rows: np.ndarray, stored: np.ndarray, scales: np.ndarray) -> tuple[float, float]:
    """(sum of squared errors of what is stored, sum of squares of the values): their ratio's root is the error.

    Args:
        rows: the values, [R, C, ...]. stored, scales: what `quantise` made of them, [R, C, ...] and [R, C].
    """
    rows = np.asarray(rows, np.float32)
    error = (restore(stored, scales) - rows).ravel()
    flat = rows.ravel()
    return float(np.dot(error, error)), float(np.dot(flat, flat))
