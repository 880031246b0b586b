"""What float16 takes from the values that are stored in it.

Letters: V views, R rows of a view, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WORTH_A_WORD = 1e-2
"""Error of a column, relative to its spread, from which on it is told."""


@dataclass(slots=True)
class Rounding:
    """Errors of the columns of one part, collected over the rows of a shard.

    Attributes:
        sums: [3, C] float64: of the values, of their squares, of their squared errors.
        count: values per column.
        whole: whether whole numbers became others.
    """

    sums: np.ndarray | float = 0.0
    count: int = 0
    whole: bool = False

    def add(self, values: np.ndarray, stored: np.ndarray) -> None:
        """Count [V, R, C] values in, and what is stored of them."""
        views = len(values)
        values = values.astype(np.float64).reshape(-1, values.shape[-1])
        errors = stored.astype(np.float64).reshape(values.shape) - values
        self.sums = self.sums + np.stack([values.sum(0), (values**2).sum(0), (errors**2).sum(0)])
        self.count += len(values)
        if not self.whole and errors.any():
            whole = (values == np.rint(values)).reshape(views, -1).all(1)
            self.whole = bool((whole & errors.reshape(views, -1).any(1)).any())

    def __add__(self, other: Rounding) -> Rounding:
        """Of the rows of both."""
        return Rounding(self.sums + other.sums, self.count + other.count, self.whole or other.whole)

    @property
    def shares(self) -> np.ndarray:
        """[C] root of the mean squared error of a column over its standard deviation; 0 where all values are equal."""
        if not self.count:
            return np.zeros(1)
        mean, square, error = self.sums / self.count
        variance = square - mean**2
        told = variance > 1e-12 * square  # less is this subtraction's own rounding
        return np.sqrt(np.divide(error, variance, out=np.zeros_like(error), where=told))

    def __str__(self) -> str:
        """What is lost, in words; nothing where it is not worth one."""
        lost = int((self.shares > WORTH_A_WORD).sum())
        if lost:
            return (
                f"float16 loses more than {WORTH_A_WORD:.0%} of the spread of {lost} of {self.shares.size} columns "
                f"(up to {self.shares.max():.0%}): values that are very small, or far from 0 and close together"
            )
        return "float16 rounds whole numbers over 2048 to others" if self.whole else ""
