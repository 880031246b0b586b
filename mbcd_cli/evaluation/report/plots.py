"""Plots of an evaluation; each function writes one file and returns its path.

Letters: C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from mbcd_cli.evaluation.analyses.robustness import DisturbedAccuracy, MissingModalities
from mbcd_cli.evaluation.analyses.trust import ConfidenceBin, RiskCurve
from mbcd_cli.evaluation.report.tables import Score, Table
from mbcd_cli.paper.rows import is_published
from mbcd_cli.plotting import (
    PALETTE,
    SEQUENTIAL,
    figure,
    legend_label,
    legend_line,
    panels,
    percent_format,
    save,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"


def colour(index: int) -> str:
    """The palette's colour for the index-th line or group, repeating after the last."""
    return PALETTE[index % len(PALETTE)]


def plot_confusion(counts: ArrayLike, label_names: Sequence[str], path: Path, *, title: str) -> Path:
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
    fig.colorbar(image, ax=ax, fraction=0.046, pad=0.03, format=percent_format(), label="of the class's clips")
    return save(fig, path)


def plot_per_class(
    figures: Mapping[str, Sequence[float | None]], label_names: Sequence[str], path: Path, *, title: str
) -> Path:
    """Accuracy per class as grouped bars; `figures`: head -> C accuracies in 0..1 (None: no clips)."""
    classes, groups = len(label_names), len(figures)
    fig, ax = figure(size=(float(np.clip(2.5 + 0.28 * classes * groups, 6.4, 24)), 4.0))
    for index, (head, values) in enumerate(figures.items()):
        heights = [np.nan if value is None else 100 * value for value in values]
        _bars(ax, heights, index, groups, label=head)
    tilt = {"rotation": 45, "ha": "right"} if classes > 8 else {"rotation": 0, "ha": "center"}
    ax.set_xticks(range(classes), label_names, **tilt)
    return _finished_bars(fig, path, ylabel="accuracy", title=title)


def _bars(ax: Axes, heights: Sequence[float], index: int, groups: int, **look: object) -> None:
    """The bars of the index-th of so many groups, beside each other at every whole number."""
    width = 0.84 / max(groups, 1)
    at = np.arange(len(heights)) + (index - (groups - 1) / 2) * width
    ax.bar(at, heights, width * 0.92, color=colour(index), **look)


def _finished_bars(fig: Figure, path: Path, *, ylabel: str, title: str) -> Path:
    (ax,) = fig.axes
    ax.grid(axis="x", visible=False)
    ax.set(ylim=(0, 100), ylabel=ylabel, title=title)
    ax.yaxis.set_major_formatter(percent_format())
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(fig, path)


def _whole(row: Sequence[str | Score]) -> bool:
    return all(isinstance(cell, Score) and cell.value is not None for cell in row[1:])


def plot_regrets(regrets: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Rule of selection -> points that each run lost against the best of its epochs: boxes, means as triangles."""
    fig, ax = figure(size=(7.2, 1.2 + 0.5 * len(regrets)))
    ax.boxplot(
        list(regrets.values()), orientation="horizontal", showmeans=True, widths=0.6, flierprops={"markersize": 3}
    )
    ax.set_yticks(range(1, len(regrets) + 1), [f"{rule} ({len(values)})" for rule, values in regrets.items()])
    ax.invert_yaxis()
    ax.set(xlabel="points below the oracle (runs)", title="Regret of each rule of selection")
    return save(fig, path)


def plot_methods(table: Table, path: Path) -> Path:
    """A table of methods (rows) by targets (columns) as grouped bars in percent, spread over seeds as error bars.

    Papers' rows are hatched; those of which only the average is known are left out.
    """
    rows = [row for row in table.rows if not is_published(str(row[0])) or _whole(row)]
    figures = [i for i in range(1, len(table.columns)) if any(isinstance(row[i], Score) for row in rows)]
    groups, columns = len(rows), [table.columns[i] for i in figures]
    fig, ax = figure(size=(float(np.clip(3 + 0.3 * groups * len(columns), 6.4, 18)), 4.0))
    for index, row in enumerate(rows):
        cells = [row[i] for i in figures]
        heights = [np.nan if c.value is None else c.value for c in cells]
        spread = [np.nan if c.std is None else c.std for c in cells]  # no bar where there is one seed
        _bars(
            ax,
            heights,
            index,
            groups,
            label=str(row[0]),
            yerr=spread if np.isfinite(spread).any() else None,
            capsize=2,
            error_kw={"elinewidth": 1},
            hatch="///" if is_published(str(row[0])) else None,
            edgecolor="white",
            linewidth=0,
        )
    ax.set_xticks(range(len(columns)), columns)
    title = fill(table.title, 64, break_long_words=False, break_on_hyphens=False)
    return _finished_bars(fig, path, ylabel="top-1 accuracy", title=title)


def plot_ranks(ranks: Mapping[str, float], critical: float, path: Path, *, title: str) -> Path:
    """Critical-difference diagram: mean ranks, 1 (best) on the left; a bar joins methods whose ranks hardly differ."""
    names = sorted(ranks, key=ranks.__getitem__)
    places = [ranks[name] for name in names]
    bars = _alike(places, critical)
    half, rows = (len(names) + 1) // 2, len(bars)
    fig, ax = figure(size=(7.2, 1.5 + 0.18 * rows + 0.26 * half))
    low, high = 1, max(len(names), 2)
    ax.plot([low, high], [0, 0], color="#333333", linewidth=1)
    for rank in range(low, high + 1):
        ax.plot([rank, rank], [0, 0.25], color="#333333", linewidth=1)
        ax.text(rank, 0.4, str(rank), ha="center", va="bottom", fontsize=9)
    end = min(low + critical, high)
    ax.plot([low, end], [1.7, 1.7], color=PALETTE[1], linewidth=2)
    text = f"critical difference {critical:.2f}" + (" (more than all ranks)" if low + critical > high else "")
    ax.text(low, 1.85, text, ha="left", va="bottom", fontsize=9, color=PALETTE[1])
    for row, (first, last) in enumerate(bars):
        ax.plot([places[first] - 0.03, places[last] + 0.03], [-0.6 - 0.5 * row] * 2, color=PALETTE[0], linewidth=4)
    margin = 0.12 * (high - low)
    for index, (name, place) in enumerate(zip(names, places, strict=True)):
        left = index < half
        depth = -0.9 - 0.5 * rows - 0.8 * (index if left else len(names) - 1 - index)
        edge = low - margin if left else high + margin
        ax.plot([place, place, edge], [0, depth, depth], color="#333333", linewidth=0.8)
        label = f"{legend_label(name)} ({place:.2f})"
        ax.annotate(
            label,
            (edge, depth),
            xytext=(-4 if left else 4, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=9,
        )
    lowest = -0.9 - 0.5 * rows - 0.8 * half
    ax.set(ylim=(lowest, 3.2), title=fill(title, 64, break_long_words=False, break_on_hyphens=False))
    ax.axis("off")
    return save(fig, path)


def _alike(places: Sequence[float], critical: float) -> list[tuple[int, int]]:
    """First and last of every longest run of ascending ranks less than `critical` apart, of two methods at least."""
    runs: list[tuple[int, int]] = []
    for first, place in enumerate(places):
        last = max(index for index, other in enumerate(places) if other - place < critical)
        if last > first and (not runs or last > runs[-1][1]):
            runs.append((first, last))
    return runs


def plot_lines(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float | None]],
    path: Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Curves of shares (0..1) in percent, over a common axis of whole numbers."""
    fig, ax = figure(size=(7.2, 4.2))
    for index, (name, values) in enumerate(lines.items()):
        heights = [np.nan if value is None else 100 * value for value in values]
        marker = _MARKERS[index % len(_MARKERS)] if len(x) <= 40 else None
        ax.plot(x, heights, label=name, color=colour(index), marker=marker, markersize=4, linewidth=1.8)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=fill(title, 64, break_long_words=False, break_on_hyphens=False))
    ax.yaxis.set_major_formatter(percent_format())
    ax.xaxis.set_major_locator(whole_numbers())
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(fig, path)


def plot_subsets(figures: MissingModalities, path: Path, *, title: str) -> Path:
    """Fused accuracy with each subset of modalities present (bars) and each modality's Shapley value (beside)."""
    values, shares = figures.top1, figures.shapley
    order = sorted(values, key=lambda name: (name != "none", name.count("+"), values[name]))
    tall = max(3.0, 1.2 + 0.36 * len(order))
    fig, (left, right) = figure(1, 2, size=(9.6, tall), width_ratios=(2.2, 1))
    bars = left.barh(range(len(order)), [100 * values[name] for name in order], color=PALETTE[0])
    left.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    left.set_yticks(range(len(order)), [name if name != "none" else "(nothing)" for name in order])
    left.set(xlim=(0, 108), xlabel="fused accuracy with these modalities present", title=title)
    left.xaxis.set_major_formatter(percent_format())
    left.grid(axis="y", visible=False)
    names = list(shares)
    points = [100 * shares[n] for n in names]
    right.barh(range(len(names)), points, color=PALETTE[1])
    for row, value in enumerate(points):
        text = f"{value:+.1f}" if abs(value) >= 0.05 else "0.0"
        right.annotate(text, (max(value, 0), row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    right.set_yticks(range(len(names)), names)
    right.axvline(0, color="#333333", linewidth=0.8)
    low, high = min(0.0, *points), max(0.0, *points)
    right.set_xlim(low - 0.05 * (high - low or 1), high + 0.3 * (high - low or 1))
    right.set(xlabel="points of accuracy", title="Shapley value")
    right.grid(axis="y", visible=False)
    return save(fig, path)


def plot_reliability(tables: Mapping[str, Sequence[ConfidenceBin]], path: Path, *, title: str) -> Path:
    """Reliability diagrams side by side: accuracy per confidence bin, its gap to the diagonal, clips per bin."""
    fig, axes = figure(
        2, len(tables), size=(3.4 * len(tables), 4.6), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1)
    )
    for column, (name, rows) in enumerate(tables.items()):
        top, bottom = axes[:, column]
        used = [row for row in rows if row.clips]
        centre = [(row.low + row.high) / 2 for row in used]
        width = 1 / len(rows)
        both = [min(row.accuracy, row.confidence) for row in used]
        top.bar(centre, both, width * 0.94, color=PALETTE[0], label="accuracy")
        less = [row.accuracy - floor for row, floor in zip(used, both, strict=True)]
        top.bar(centre, less, width * 0.94, bottom=both, color=PALETTE[5], label="accuracy over confidence")
        more = [row.confidence - floor for row, floor in zip(used, both, strict=True)]
        style = {"color": "none", "edgecolor": PALETTE[1], "linewidth": 0, "hatch": "////"}
        top.bar(centre, more, width * 0.94, bottom=both, label="confidence over accuracy", **style)
        top.plot([0, 1], [0, 1], color="#333333", linestyle="--", linewidth=1)
        top.set(xlim=(0, 1), ylim=(0, 1), title=name)
        bottom.bar(centre, [row.clips for row in used], width * 0.94, color=PALETTE[7])
        bottom.set(xlabel="confidence")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("clips")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    fig.suptitle(title, fontsize=11)
    return save(fig, path)


def plot_risk(curves: Mapping[str, RiskCurve], path: Path, *, title: str) -> Path:
    """Risk-coverage curves: error among the most confident share of the clips."""
    fig, ax = figure(size=(6.8, 4.0))
    for index, (name, curve) in enumerate(curves.items()):
        ax.plot([100 * c for c in curve.coverage], [100 * r for r in curve.risk], label=name, color=colour(index))
    ax.set(xlabel="coverage: clips answered, the most confident first", ylabel="error among them", title=title)
    ax.set(xlim=(0, 100), ylim=(0, None))
    ax.xaxis.set_major_formatter(percent_format())
    ax.yaxis.set_major_formatter(percent_format())
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(fig, path)


def plot_disturbed(records: Sequence[DisturbedAccuracy], path: Path, *, title: str, xlabel: str) -> Path:
    """Accuracy against the level of a disturbance: one panel per kind, one fused and one own line per modality."""
    kinds = list(dict.fromkeys(record.kind for record in records))
    modalities = list(dict.fromkeys(record.modality for record in records))
    fig, axes = panels(
        len(kinds), 3, lambda rows, columns: (max(6.2, 3.3 * columns), 0.8 + 2.9 * rows), sharex=True, sharey=True
    )
    for ax, kind in zip(axes, kinds, strict=True):
        for index, modality in enumerate(modalities):
            shown = [r for r in records if (r.kind, r.modality) == (kind, modality)]
            levels, look = [r.level for r in shown], {"color": colour(index), "markersize": 4}
            if shown:
                ax.plot(levels, [100 * r.fused for r in shown], marker="o", **look)
                ax.plot(levels, [100 * r.unimodal for r in shown], marker="x", ls=":", **look)
        ax.set(title=kind if len(kinds) > 1 else "", ylim=(0, 100))
    for ax in axes[::3]:
        ax.set_ylabel("accuracy")
        ax.yaxis.set_major_formatter(percent_format())
    fig.supxlabel(xlabel, fontsize=10)
    fig.suptitle(title, fontsize=11)
    lines = [legend_line(color=colour(i), label=f"{name} disturbed") for i, name in enumerate(modalities)]
    lines += [
        legend_line(color="#333333", marker="o", markersize=4, label="fused head"),
        legend_line(color="#333333", marker="x", markersize=4, ls=":", label="its own head"),
    ]
    fig.legend(handles=lines, loc="outside right center", fontsize=9)
    return save(fig, path)


def plot_map(
    points: ArrayLike, groups: Mapping[str, tuple[ArrayLike, Sequence[str]]], path: Path, *, title: str
) -> Path:
    """A two-dimensional map [N, 2], one panel per grouping: name -> (indices [N], names of the groups)."""
    points = np.asarray(points)
    fig, axes = figure(1, len(groups), size=(6.0 * len(groups), 4.6), squeeze=False)
    for ax, (name, (index, names)) in zip(axes[0], groups.items(), strict=True):
        index = np.asarray(index)
        present = [g for g in range(len(names)) if (index == g).any()]
        for at, group in enumerate(present):
            chosen = points[index == group]
            ax.scatter(
                chosen[:, 0],
                chosen[:, 1],
                s=16,
                alpha=0.8,
                linewidths=0,
                color=colour(at),
                marker=_MARKERS[(at // len(PALETTE)) % len(_MARKERS)],
                label=legend_label(names[group]),
            )
        ax.grid(False)
        ax.set(xticks=[], yticks=[], title=f"by {name}")
        if len(present) <= 24:
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, ncols=1 + (len(present) > 16))
    fig.suptitle(title, fontsize=11)
    return save(fig, path)
