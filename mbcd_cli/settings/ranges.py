"""What `mbcd sweep --search` draws a setting from: a mark beside the field, as its role is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from mbcd_cli.settings.roles import Slice

_DIGITS = 4
"""Significant digits of a draw: what is read in settings and tables is what was trained with."""


@dataclass(frozen=True, slots=True)
class Range:
    """Where a search looks for a number.

    Attributes:
        low, high: an even draw's bounds.
        times: they are multiples of the setting's value without a search, and the draw is even in its logarithm; a
            value of zero stays.
        choices: these and nothing else, in place of bounds.
        benchmark: decimals of a draw in the public benchmark's search; None where that leaves the setting alone.
        only: (another setting of the group, its values) without which this one says nothing.
    """

    low: float = 0.0
    high: float = 0.0
    times: bool = False
    choices: tuple[int, ...] = ()
    benchmark: int | None = None
    only: tuple[str, *tuple[object, ...]] | None = None

    def bounds(self, value: float) -> tuple[float, float]:
        """The least and the largest draw where the setting is `value` without a search."""
        if self.choices:
            return min(self.choices), max(self.choices)
        return (_rounded(self.low * value), _rounded(self.high * value)) if self.times else (self.low, self.high)

    def draw(self, share: float, value: float, *, benchmark: bool = False) -> float:
        """What stands at `share` (0..1) of the range where the setting is `value` without a search."""
        if self.choices:
            return self.choices[int(share * len(self.choices))]
        if self.times:
            return _rounded(value * self.low * (self.high / self.low) ** share)
        drawn = self.low + share * (self.high - self.low)
        return round(drawn, self.benchmark) if benchmark else _rounded(drawn)

    def __str__(self) -> str:
        if self.choices:
            return f"among {', '.join(map(str, self.choices))}"
        switch, *values = self.only or ("",)
        where = f" where {switch} is {' or '.join(str(value).lower() for value in values)}" if values else ""
        return f"from {self.low:g} to {self.high:g}{' times what is set' if self.times else ''}{where}"


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


AROUND = Range(0.1, 10.0, times=True)
"""A decade to either side of what is set."""


def range_of(field: FieldInfo) -> Range | None:
    """What a search draws this field from."""
    return next((mark for mark in field.metadata if isinstance(mark, Range)), None)


def searched(group: Slice, path: str = "") -> Iterator[tuple[str, Range, float]]:
    """(dotted path, range, value) of every setting in `group` that a search draws, but what is switched off in it."""
    for name, field in type(group).model_fields.items():
        value, drawn_from = getattr(group, name), range_of(field)
        if isinstance(value, Slice):
            yield from searched(value, f"{path}{name}.")
        elif drawn_from is not None and not (drawn_from.times and value == 0):
            switch, *values = drawn_from.only or (name, value)
            if getattr(group, switch) in values:
                yield f"{path}{name}", drawn_from, value
