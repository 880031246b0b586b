"""Plots of landscapes, drawn from files alone: several checkpoints in one figure, on one scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from mbcd_cli import plotting
from mbcd_cli.landscape.hessian import Quadrature
from mbcd_cli.landscape.sharpness import flatness_curve
from mbcd_cli.landscape.store import Grid, load_arrays, read_grid

_LEVELS = 18
_PLAIN = ticker.FuncFormatter(lambda value, _: f"{value:g}")


def with_error(value: float, error: float) -> str:
    """`250 ± 12`: two digits of the error, the value to the same place; without an error the value alone."""
    value, error = float(value), float(error)
    if not (np.isfinite(value) and np.isfinite(error)) or error <= 0:
        return f"{value:.4g}"
    places = 1 - int(np.floor(np.log10(error)))
    if not -2 <= places <= 6:
        return f"{value:.4g} ± {error:.2g}"
    return f"{round(value, places):.{max(places, 0)}f} ± {round(error, places):.{max(places, 0)}f}"


def _read(files: Mapping[str, Path]) -> dict[str, Grid]:
    return {label: read_grid(path) for label, path in files.items()}


def _levels(grids: Sequence[Grid]) -> tuple[np.ndarray, Normalize]:
    """Contour levels for all grids together: logarithmic where the losses span more than a factor of 10."""
    finite = [grid.loss[np.isfinite(grid.loss)] for grid in grids]
    values = np.concatenate(finite) if finite else np.array([])
    if not len(values):
        return np.array([0.0, 1.0]), Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > 10:
        low = max(low, high * 1e-4)
        return np.geomspace(low, high, _LEVELS), LogNorm(low, high)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, _LEVELS), Normalize(low, high)


def _holes(grid: Grid) -> str:
    """What a reader must know about points without a colour."""
    parts = []
    if grid.non_finite:
        parts.append(f"{grid.non_finite} points without a finite loss")
    if grid.missing:
        parts.append(f"{grid.missing} not computed")
    return ", ".join(parts)


def _title(title: str, grids: Iterable[Grid]) -> str:
    subjects = dict.fromkeys(grid.about.get("subject", "") for grid in grids)
    return f"{title} ({next(iter(subjects))})" if len(subjects) == 1 and any(subjects) else title


def _distance(grids: Iterable[Grid]) -> str:
    return next((grid.about["distance"] for grid in grids if "distance" in grid.about), "")


def _marks(axes: Axes, grid: Grid) -> None:
    marks = dict(zip(grid.mark_labels, grid.marks, strict=True))
    steps = {label: xy for label, xy in marks.items() if label.startswith("epoch ")}
    if steps:
        path = np.array([*steps.values(), *(xy for label, xy in marks.items() if label not in steps)])
        axes.plot(path[:, 0], path[:, 1], color="white", linewidth=3, zorder=3)
        axes.plot(path[:, 0], path[:, 1], "-o", color="black", markersize=3, linewidth=1.2, zorder=3)
        _name(axes, next(iter(steps)), next(iter(steps.values())))
    for label, (x, y) in marks.items():
        if label not in steps:
            axes.plot([x], [y], marker="*", color="white", markeredgecolor="black", markersize=11, zorder=4)
            if len(marks) > 1:
                _name(axes, label, (x, y))


def _name(axes: Axes, label: str, xy: Sequence[float]) -> None:
    axes.annotate(
        label,
        tuple(xy),
        xytext=(6, 6),
        textcoords="offset points",
        fontsize=8,
        zorder=5,
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )


def plot_surfaces(files: Mapping[str, Path], path: Path, *, title: str = "Loss surface") -> Path:
    """Contours of 2-D grids (label -> file), one panel each, on one colour scale; points without a value are holes."""
    grids = _read(files)
    levels, scale = _levels(list(grids.values()))
    fig, panels = plotting.panels(len(grids), 3, lambda rows, columns: (4.0 * columns + 1.0, 3.9 * rows + 0.6))
    filled = None
    for axes, (label, grid) in zip(panels, grids.items(), strict=True):
        axes.grid(False)
        axes.set_facecolor("#d9d9d9")
        shown = np.ma.masked_invalid(grid.loss)
        if min(shown.shape) > 1 and shown.count():
            clipped = np.ma.clip(shown, levels[0], levels[-1])
            filled = axes.contourf(
                grid.x, grid.y, clipped, levels=levels, norm=scale, cmap=plotting.SEQUENTIAL, extend="neither"
            )
            axes.contour(grid.x, grid.y, clipped, levels=levels[::2], colors="white", linewidths=0.4, alpha=0.6)
        bad = np.argwhere(grid.computed & ~np.isfinite(grid.loss))
        axes.plot(grid.x[bad[:, 1]], grid.y[bad[:, 0]], "x", color="#b00000", markersize=4, zorder=3)
        _marks(axes, grid)
        holes = _holes(grid)
        axes.set_title(f"{label}\n({holes})" if holes else label)
        axes.set_xlabel(grid.about.get("x", "direction 1"))
        axes.set_ylabel(grid.about.get("y", "direction 2"))
        axes.set_xlim(grid.x[0], grid.x[-1])
        axes.set_ylim(grid.y[0], grid.y[-1])
        axes.set_aspect("equal" if grid.about.get("equal", True) else "auto")
    if filled is not None:
        bar = fig.colorbar(filled, ax=panels, label="loss (cross-entropy)", shrink=0.85)
        _plain_ticks(bar.ax.yaxis, levels, logarithmic=isinstance(scale, LogNorm))
    fig.suptitle(_title(title, grids.values()))
    return plotting.save(fig, path)


def _plain_ticks(where, levels: np.ndarray, *, logarithmic: bool) -> None:
    if logarithmic:
        decades = range(int(np.floor(np.log10(levels[0]))), int(np.ceil(np.log10(levels[-1]))) + 1)
        ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if levels[0] <= m * 10.0**d <= levels[-1]]
        where.set_major_locator(ticker.FixedLocator(ticks))
        where.set_minor_locator(ticker.NullLocator())
    else:
        where.set_major_locator(ticker.MaxNLocator(7))
    where.set_major_formatter(_PLAIN)


def plot_surfaces_3d(files: Mapping[str, Path], path: Path) -> Path:
    """The same grids in perspective, one panel each, on one height and colour scale."""
    grids = _read(files)
    levels, scale = _levels(list(grids.values()))
    logarithmic = isinstance(scale, LogNorm)
    height = np.log10 if logarithmic else (lambda value: value)
    in_perspective = {"projection": "3d", "computed_zorder": False}
    fig, panels = plotting.panels(
        len(grids), 3, lambda rows, columns: (4.6 * columns, 4.2 * rows), subplot_kw=in_perspective
    )
    for axes, (label, grid) in zip(panels, grids.items(), strict=True):
        a, b = np.meshgrid(grid.x, grid.y)
        z = np.where(np.isfinite(grid.loss), grid.loss, np.nan)
        corners = np.clip(np.nan_to_num(z, nan=levels[-1]), levels[0], levels[-1])
        faces = (corners[:-1, :-1] + corners[1:, :-1] + corners[:-1, 1:] + corners[1:, 1:]) / 4
        colours = _colours(scale, faces)
        axes.plot_surface(
            a, b, height(np.clip(z, levels[0], None)), facecolors=colours, rstride=1, cstride=1, shade=False,
            edgecolor="#ffffff55", linewidth=0.3, antialiased=True,
        )  # fmt: skip
        axes.set_zlim(height(levels[0]), height(levels[-1]))
        if logarithmic:
            ends = np.log10(levels[[0, -1]])
            decades = range(int(np.floor(ends[0])), int(np.ceil(ends[1])) + 1)
            heights = [d + np.log10(m) for d in decades for m in (1, 3)]
            ticks = [t for t in heights if ends[0] <= t <= ends[1]]
            axes.set_zticks(ticks, [f"{10**t:.2g}" for t in ticks])
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.set_box_aspect((1, 1, 0.75), zoom=0.95)
        axes.view_init(elev=28, azim=-55)
        axes.set_xlabel(grid.about.get("x", "direction 1"), fontsize=8)
        axes.set_ylabel(grid.about.get("y", "direction 2"), fontsize=8)
        axes.set_zlabel("loss", fontsize=8)
        axes.tick_params(labelsize=7, pad=0)
        holes = _holes(grid)
        axes.set_title(f"{label}\n({holes})" if holes else label)
    fig.suptitle(_title("Loss surface", grids.values()))
    return plotting.save(fig, path)


def _colours(scale: Normalize, values: np.ndarray) -> np.ndarray:
    return matplotlib.colormaps[plotting.SEQUENTIAL](scale(values))


def plot_curves(
    files: Mapping[str, Path], path: Path, *, title: str = "Loss along a random direction", xlabel: str = "distance"
) -> Path:
    """1-D grids (label -> file): loss above, accuracy below; gaps where there is no finite loss."""
    grids = _read(files)
    fig, (top, bottom) = plotting.figure(2, 1, size=(6.4, 5.6), sharex=True, height_ratios=(3, 2))
    for number, (label, grid) in enumerate(grids.items()):
        colour = plotting.PALETTE[number % len(plotting.PALETTE)]
        holes = _holes(grid)
        shown = np.where(np.isfinite(grid.loss[0]), grid.loss[0], np.nan)
        dots = "." if holes else None  # a point between holes has no line
        top.plot(
            grid.x,
            shown,
            color=colour,
            marker=dots,
            label=plotting.legend_label(f"{label} ({holes})" if holes else label),
        )
        accuracy = np.where(np.isfinite(shown), grid.accuracy[0], np.nan)
        bottom.plot(grid.x, 100 * accuracy, color=colour, marker=dots)
        for axes in (top, bottom):
            for mark, (x, _) in zip(grid.mark_labels, grid.marks, strict=True):
                if len(grid.marks) > 1:
                    axes.axvline(x, color="#999999", linewidth=0.8, linestyle=":")
                    if axes is top and len(grids) == 1:
                        axes.annotate(
                            mark, (x, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                            textcoords="offset points", fontsize=8, color="#555555",
                        )  # fmt: skip
    values = np.concatenate([grid.loss[np.isfinite(grid.loss)] for grid in grids.values()] or [np.array([])])
    if len(values) and values.min() > 0 and values.max() / values.min() > 30:
        top.set_yscale("log")
        top.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=15))
        top.yaxis.set_minor_formatter(ticker.NullFormatter())
        top.yaxis.set_major_formatter(_PLAIN)
    top.set_ylabel("loss (cross-entropy)")
    bottom.set_ylabel("accuracy (%)")
    bottom.set_ylim(0, 102)
    bottom.set_xlabel(f"{xlabel} {_distance(grids.values())}".rstrip())
    top.legend()
    top.set_title(_title(title, grids.values()))
    return plotting.save(fig, path)


def plot_flatness(
    files: Mapping[str, Path],
    path: Path,
    *,
    worst: Mapping[str, Path] | None = None,
) -> Path:
    """Mean loss increase with 95 % confidence bands (label -> file), and beside it the worst case's."""
    labels = list(dict.fromkeys([*files, *(worst or {})]))
    grids = [*_read(files).values(), *_read(worst or {}).values()]
    colours = {label: plotting.PALETTE[n % len(plotting.PALETTE)] for n, label in enumerate(labels)}
    panels = [p for p, wanted in (("mean", files), ("worst", worst)) if wanted]
    fig, row = plotting.figure(1, len(panels), size=(5.2 * len(panels) + 1.2, 4.4), squeeze=False)
    for axes, panel in zip(row[0], panels, strict=True):
        for label, path_ in (files if panel == "mean" else worst or {}).items():
            grid = read_grid(path_)
            holes = _holes(grid)
            style = {"color": colours[label], "markersize": 4, "label": f"{label} ({holes})" if holes else label}
            if panel == "mean":
                curve = flatness_curve(grid, centre=grid.about["centre_loss"])
                low, high = curve.mean - curve.half_width, curve.mean + curve.half_width
                axes.plot(curve.radii, curve.mean, "-o", **style)
                axes.fill_between(curve.radii, low, high, color=colours[label], alpha=0.18, linewidth=0)
            else:
                loss = np.where(np.isfinite(grid.loss[0]), grid.loss[0], np.nan)
                axes.plot(grid.x, loss - grid.about["centre_loss"], "--s", **style)
        axes.set_title("mean over random directions, 95 % band" if panel == "mean" else "worst case (ascent)")
        axes.set_xlabel(f"radius of the perturbation {_distance(grids)}".rstrip())
        axes.set_ylabel("loss increase")
        axes.legend(loc="upper left")
    fig.suptitle(_title("Loss increase around the checkpoint", grids))
    return plotting.save(fig, path)


def plot_spectra(files: Mapping[str, Path], path: Path) -> Path:
    """Smoothed spectral densities (label -> file) on one logarithmic scale; ticks mark the computed eigenvalues."""
    loaded = {label: load_arrays(file) for label, file in files.items()}
    fig, axes = plotting.figure(size=(6.8, 4.4))
    nodes = [a["nodes"][np.isfinite(a["nodes"])] for a, _ in loaded.values() if "nodes" in a]
    nodes += [a["eigenvalues"][np.isfinite(a["eigenvalues"])] for a, _ in loaded.values()]
    values = np.concatenate(nodes) if nodes else np.array([])
    low, high = (float(values.min()), float(values.max())) if len(values) else (-1.0, 1.0)
    width = max(high - low, 1e-12) / 150
    at = np.linspace(low - 5 * width, high + 5 * width, 1200)
    for number, (label, (arrays, _)) in enumerate(loaded.items()):
        colour = plotting.PALETTE[number % len(plotting.PALETTE)]
        if "nodes" in arrays and np.isfinite(arrays["nodes"]).all():
            density = Quadrature(arrays["nodes"], arrays["weights"]).density(at, width=width)
            axes.plot(at, density, color=colour, linewidth=1.3)
        for value, error in zip(arrays["eigenvalues"], arrays["errors"], strict=True):
            axes.errorbar(
                [value], [0.03 + 0.04 * number], xerr=[error], fmt="|", color=colour, markersize=9,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
        plain = f"trace {with_error(arrays['trace'], arrays['trace_error'])}, top {arrays['eigenvalues'][0]:.3g}"
        axes.plot([], [], color=colour, label=f"{label}: {plain}")
    if len(values):
        axes.set_yscale("log")
        axes.set_ylim(1e-7 / width, 2 / width)  # all of it in one place is 0.4 / width
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel(f"density, by Gaussians of width {width:.2g}")
    axes.legend(loc="upper right", fontsize=9)
    subjects = dict.fromkeys(about.get("subject", "") for _, about in loaded.values())
    title = "Spectral density of the Hessian"
    axes.set_title(f"{title} ({next(iter(subjects))})" if len(subjects) == 1 else title)
    return plotting.save(fig, path)
