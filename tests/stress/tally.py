"""What became of many files, counted per kind and printed at the end of a module."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path


class Tally:
    """Counts of outcomes per codec, per suffix and of all files.

    Attributes:
        files: kind -> outcome -> files.
    """

    def __init__(self) -> None:
        self.files: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._causes: list[str] = []

    def add(self, codec: str, path: Path, outcome: str, cause: str = "") -> None:
        """One file more; `cause` is listed."""
        for kind in (codec, path.suffix, "all"):
            self.files[kind][outcome] += 1
        if cause:
            self._causes.append(f"{codec} {path.name}: {cause}")

    def close(self) -> None:
        """Prints the counts, and the causes."""
        lines = [f"{kind:14} {dict(counts)}" for kind, counts in self.files.items()]
        print("\n" + "\n".join([*lines, *self._causes]), file=sys.stderr)
