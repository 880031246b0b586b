"""Plots of an evaluation; each function writes one file and returns its path.

Letters: C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mbcd_cli.plotting import PALETTE, SEQUENTIAL, figure, save

_MARKERS = "osD^vPX*"


def colour(index: int) -> str:
    """The palette's colour for the index-th line or group, repeating after the last."""
    return PALETTE[index % len(PALETTE)]


def plot_confusion(counts: Any, label_names: Sequence[str], path: Path, *, title: str) -> Path:
    """Confusion matrix [C, C] in percent of each row (a label's clips); figures in cells up to 20 classes."""
    counts = np.asarray(counts, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    share = 100 * np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    classes = len(label_names)
    side = float(np.clip(2.2 + 0.42 * classes, 4.2, 16))
    fig, ax = figure(size=(side + 0.8, side))
    image = ax.imshow(share, cmap=SEQUENTIAL, vmin=0, vmax=100)
    ax.set_facecolor("#d9d9d9")  # a class without clips
    ax.grid(False)
    if classes <= 60:
        ax.set_xticks(range(classes), label_names, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(classes), [f"{name} ({int(n)})" for name, n in zip(label_names, totals[:, 0], strict=True)])
    if classes <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            value = share[row, column]
            text = f"{value:.0f}" if value >= 0.5 else "<1"
            tint = "black" if value > 55 else "white"
            ax.text(column, row, text, ha="center", va="center", fontsize=8, color=tint)
    ax.set(xlabel="predicted class", ylabel="class (clips)", title=title)
    fig.colorbar(image, ax=ax, fraction=0.046, pad=0.03, format=PercentFormatter(), label="of the class's clips")
    return save(fig, path)


def plot_per_class(
    figures: Mapping[str, Sequence[float | None]], label_names: Sequence[str], path: Path, *, title: str
) -> Path:
    """Accuracy per class as grouped bars; `figures`: head -> C accuracies in 0..1 (None: no clips)."""
    classes, groups = len(label_names), len(figures)
    fig, ax = figure(size=(float(np.clip(2.5 + 0.28 * classes * groups, 6.4, 24)), 4.0))
    width = 0.84 / max(groups, 1)
    for index, (head, values) in enumerate(figures.items()):
        heights = [np.nan if value is None else 100 * value for value in values]
        at = np.arange(classes) + (index - (groups - 1) / 2) * width
        ax.bar(at, heights, width * 0.92, label=head, color=colour(index))
    ax.set_xticks(
        range(classes),
        label_names,
        rotation=45 if classes > 8 else 0,
        ha="right" if classes > 8 else "center",
    )
    ax.grid(axis="x", visible=False)
    ax.set(ylim=(0, 100), ylabel="accuracy", title=title)
    ax.yaxis.set_major_formatter(PercentFormatter())
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(fig, path)


def plot_lines(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float | None]],
    path: Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    percent: bool = True,
    marks: Mapping[float, str] | None = None,
    whole: bool = False,
) -> Path:
    """Curves over a common axis; `percent` scales 0..1 to percent, `marks` are labelled vertical lines."""
    fig, ax = figure(size=(7.2, 4.2))
    scale = 100.0 if percent else 1.0
    for index, (name, values) in enumerate(lines.items()):
        heights = [np.nan if value is None else scale * value for value in values]
        marker = _MARKERS[index % len(_MARKERS)] if len(x) <= 40 else None
        ax.plot(x, heights, label=name, color=colour(index), marker=marker, markersize=4, linewidth=1.8)
    for at, label in (marks or {}).items():
        ax.axvline(at, color="#555555", linestyle="--", linewidth=1)
        ax.annotate(
            label,
            (at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
            fontsize=8,
        )
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter())
    if whole:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(fig, path)
