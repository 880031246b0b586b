"""The results of an evaluation, or of several runs, printed for a person: tables and paths on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbcd_cli import console
from mbcd_cli.evaluation.report.sections import summary_tables
from mbcd_cli.evaluation.report.tables import Table, plain


def print_table(table: Table) -> None:
    """Print one table and its note."""
    console.table(table.title, table.columns, [[plain(cell) for cell in row] for row in table.rows])
    if table.note:
        console.out.print(table.note, markup=False)


def print_results(results: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Print the tables of one evaluation, its warnings (on stderr), and where its files lie."""
    for table in summary_tables(results):
        print_table(table)
    for warning in results.get("warnings", ()):
        console.warn(warning)
    for name in ("report", "results"):
        if name in files:
            console.out.print(f"{name}: {files[name]}", markup=False)
    folders = dict.fromkeys(path.parent for name, path in files.items() if name not in ("report", "results"))
    for folder in folders:
        count = sum(path.parent == folder for path in files.values())
        console.out.print(f"{folder.name}: {folder} ({count} files)", markup=False)


def print_comparison(tables: Sequence[Table], files: Mapping[str, Path], warnings: Sequence[str]) -> None:
    """Print the tables of several runs, warnings (on stderr) and paths."""
    for table in tables:
        print_table(table)
    for warning in warnings:
        console.warn(warning)
    for name, path in files.items():
        console.out.print(f"{name}: {path}", markup=False)
