"""A table of figures, and how it looks as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class Score:
    """A figure, with its spread over seeds where there are several.

    Attributes:
        value: the mean, None where there is nothing.
        std: sample standard deviation over seeds, None for a single one.
        best: the best of its column.
    """

    value: float | None
    std: float | None = None
    best: bool = False

    @classmethod
    def over(cls, values: Sequence[float]) -> Score:
        """Mean and sample standard deviation of `values`; empty gives an empty cell."""
        if not len(values):
            return cls(None)
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), spread)

    def text(self, between: str = " ± ", digits: int = 2) -> str:
        """`63.16 ± 0.40`, `63.16`, or `-`."""
        if self.value is None:
            return "-"
        mean = f"{self.value:.{digits}f}"
        return mean if self.std is None else f"{mean}{between}{self.std:.{digits}f}"


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table; the first column is text, a cell is text or a `Score`.

    Attributes:
        name: short, for file names.
        note: a sentence under the table, or empty.
        blocks: consecutive rows of one first cell belong together, and it is written once per block.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Score]] = field(default_factory=list)
    note: str = ""
    blocks: bool = False

    def starts(self, index: int) -> bool:
        """Whether the index-th row begins a block (False for the first one)."""
        return self.blocks and index > 0 and self.rows[index][0] != self.rows[index - 1][0]

    def shown(self) -> list[list[str | Score]]:
        """The rows as they are read: a block's name in its first row only."""
        return [
            ["", *row[1:]] if self.blocks and i and not self.starts(i) else list(row) for i, row in enumerate(self.rows)
        ]

    def width(self) -> int:
        """Characters of a line in a terminal, with rules and spaces."""
        rows = [self.columns, *([plain(cell) for cell in row] for row in self.rows)]
        return sum(max(map(len, column)) + 3 for column in zip(*rows, strict=True)) + 1

    def fitting(self, width: int) -> Table:
        """The table turned on its side where only that fits into `width` characters; itself otherwise."""
        if self.blocks or self.width() <= width:
            return self
        columns = [self.columns[0], *(plain(row[0]) for row in self.rows)]
        rows = [[name, *(row[i] for row in self.rows)] for i, name in enumerate(self.columns) if i]
        turned = replace(self, columns=columns, rows=rows)
        return turned if turned.width() <= width else self


def plain(cell: str | Score) -> str:
    """A cell as plain text."""
    return cell if isinstance(cell, str) else cell.text()


def markdown(table: Table) -> str:
    """The table in Markdown, the best of a column in bold."""

    def cell(value: str | Score) -> str:
        text = plain(value).replace("|", "\\|")
        return f"**{text}**" if isinstance(value, Score) and value.best else text

    def line(values: Sequence[str]) -> str:
        return f"| {' | '.join(values)} |"

    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    lines = [f"### {table.title}", "", line(table.columns), line(rule)]
    lines += [line([cell(value) for value in row]) for row in table.shown()]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines) + "\n"


def comma_separated(table: Table) -> str:
    """The table as CSV; a column with spreads is followed by its `std` column."""
    spread = [
        any(isinstance(row[i], Score) and row[i].std is not None for row in table.rows)
        for i in range(len(table.columns))
    ]
    header = [name for i, c in enumerate(table.columns) for name in ([c, f"{c} std"] if spread[i] else [c])]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        cells: list[str] = []
        for i, value in enumerate(row):
            if isinstance(value, str):
                cells += [value, ""] if spread[i] else [value]
                continue
            figures = [value.value, value.std] if spread[i] else [value.value]
            cells += ["" if figure is None else f"{figure:.4f}" for figure in figures]
        writer.writerow(cells)
    return out.getvalue()


_LATEX = str.maketrans(
    {
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
        "<": "$<$",
        ">": "$>$",
    }
)


_SIGNED = re.compile(r"[+-]\d+(\.\d+)?")


def latex(table: Table) -> str:
    """The table in LaTeX (booktabs), the best of a column in bold."""

    def cell(value: str | Score) -> str:
        if isinstance(value, str):
            return f"${value}$" if _SIGNED.fullmatch(value) else value.translate(_LATEX)
        if value.value is None:
            return "--"
        text = f"\\textbf{{{value.value:.2f}}}" if value.best else f"{value.value:.2f}"
        return text if value.std is None else f"{text}\\,{{\\scriptsize$\\pm${value.std:.2f}}}"

    rows = [" & ".join(cell(value) for value in row) + r" \\" for row in table.shown()]
    lines = [
        "% Needs \\usepackage{booktabs}.",
        r"\begin{table}[t]",
        r"\centering",
        f"\\caption{{{f'{table.title}. {table.note}'.strip().translate(_LATEX)}}}",
        f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{{'ll' if table.blocks else 'l'}{'c' * (len(table.columns) - 1 - table.blocks)}}}",
        r"\toprule",
        " & ".join(c.translate(_LATEX) for c in table.columns) + r" \\",
        r"\midrule",
        *(f"\\midrule\n{row}" if table.starts(i) else row for i, row in enumerate(rows)),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
