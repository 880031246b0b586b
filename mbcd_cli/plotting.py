"""What all plots share: one style, a colour-blind-safe palette, atomic saving (without pyplot)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mbcd_cli.files import written

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe and Ito's palette without its yellow, which is too light for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
SEQUENTIAL = "cividis"
"""Colour map for ordered values; readable with every kind of colour vision and in grey."""

_SCRIPTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "SimHei",
    "Malgun Gothic",
    "Arial Unicode MS",
    "Unifont",
)
"""Fonts with letters that matplotlib's own lacks, where one is installed: names of classes and domains are users'."""

DPI = 130
"""Pixels an inch."""


@cache
def _style() -> None:
    """Once, when something is drawn: matplotlib takes half a second to import."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    matplotlib.rcdefaults()  # not what a file of the user's says: TeX, other fonts and sizes
    matplotlib.rcParams.update(
        {
            "font.family": ["DejaVu Sans", *(name for name in _SCRIPTS if name in installed)],
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
    )


def percent_format() -> PercentFormatter:
    """Numbers from 0 to 100 as percentages."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter()


def whole_numbers() -> MaxNLocator:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def legend_line(**look: object) -> Line2D:
    """A line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (6.4, 4.2), **subplots: object):
    """A figure and its axes, as `matplotlib.pyplot.subplots` returns them; `size` in inches is the whole figure's."""
    from matplotlib.figure import Figure

    _style()
    fig = Figure(figsize=size, layout="constrained")
    return fig, fig.subplots(rows, columns, **subplots)


def panels(count: int, most: int, size: Callable[[int, int], tuple[float, float]], **subplots: object):
    """A figure and the axes of `count` panels, at most `most` a row; places that are left over show nothing.

    Where panels share their x axis, the lowest one of every column has the labels.

    Args:
        size: (rows, columns) -> inches of the whole figure.
    """
    columns = min(most, count)
    rows = -(-count // columns)
    fig, grid = figure(rows, columns, size=size(rows, columns), squeeze=False, **subplots)
    for axes in grid.flat[count:]:
        axes.remove()  # matplotlib cannot lay out hidden axes in perspective
    for axes in grid.flat[count - columns : count]:  # matplotlib leaves labels to the last row, shown or not
        axes.xaxis.set_tick_params(labelbottom=True)
    return fig, list(grid.flat[:count])


def legend_label(name: str) -> str:
    """A name of a user's in a legend, which leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def as_formula(name: str) -> str:
    """A name of a user's inside a formula: its dollar signs are dollar signs."""
    return name.replace("$", r"\$")


def _as_written(fig: Figure, formulas: Container[str]) -> None:
    """Dollar signs in names are dollar signs, but in `formulas` and in what matplotlib makes of powers."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    axes = [axis for panel in fig.axes for axis in panel._axis_map.values()]
    made = [axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)]
    powers = {text for axis in made for text in axis.get_ticklabels(which="both")}
    for text in fig.findobj(Text):
        if text not in powers and text.get_text() not in formulas:
            text.set_parse_math(False)


def save(fig: Figure, path: Path, *, formulas: Container[str] = ()) -> Path:
    """Write `fig` tightly cropped (the format follows the suffix) aside, then rename it to `path`.

    Args:
        formulas: texts of the figure in which dollar signs enclose formulas.

    Raises:
        FileError: it cannot be written.
    """
    path = Path(path)
    _as_written(fig, formulas)
    # Without software version and date the same figure gives the same bytes.
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}}.get(path.suffix)
    with written(path) as aside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a letter that the font lacks is a box
        fig.savefig(aside, format=path.suffix[1:], dpi=DPI, bbox_inches="tight", metadata=metadata)
    return path
