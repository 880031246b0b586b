"""What all plots share: the Agg backend, a colour-blind-safe palette, and atomic saving."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  (the backend must be chosen first)
from matplotlib.figure import Figure  # noqa: E402

# Okabe and Ito's palette without its yellow, which is too light for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
SEQUENTIAL = "cividis"
"""Colour map for ordered values; readable with every kind of colour vision and in grey."""

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "mbcd",
}


def figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (6.4, 4.2), **subplots: Any):
    """A styled figure and its axes, as `plt.subplots` returns them; `size` in inches is the whole figure's."""
    with matplotlib.rc_context(_STYLE):
        return plt.subplots(rows, columns, figsize=size, **subplots)


def save(fig: Figure, path: Path, *, dpi: int = 130) -> Path:
    """Write `fig` (tight layout; the format follows the suffix) aside, rename it to `path`, and close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with matplotlib.rc_context(_STYLE):
            # Without the software version and date the same figure gives the same bytes.
            metadata = {"Software": None} if path.suffix == ".png" else None
            fig.savefig(aside, dpi=dpi, bbox_inches="tight", metadata=metadata)
        aside.replace(path)
    finally:
        plt.close(fig)
        aside.unlink(missing_ok=True)
    return path
