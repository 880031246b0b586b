"""`mbcd list`: the choices that messages refer to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command
from mbcd_cli.errors import SettingsError
from mbcd_cli.naming import did_you_mean

LISTS = ("presets", "datasets", "encoders", "methods")


@command("cache.dir", layered=False, examples=("mbcd list presets", "mbcd list datasets --cache-dir cache"))
def list(asked: Asked, what: Annotated[str, typer.Argument(help="presets, datasets, encoders or methods.")]) -> Reply:
    """List what can be chosen."""
    columns, rows = choices(what, asked.flags.get("cache.dir") or Path("cache"))
    shown = [["yes" if cell is True else "" if cell in (None, False) else cell for cell in row] for row in rows]
    return [dict(zip(columns, row, strict=True)) for row in rows], partial(console.table, what, columns, shown)


def choices(what: str, cache: Path) -> tuple[tuple[str, ...], Sequence[tuple[object, ...]]]:
    """Column names and rows for one kind of choice.

    Raises:
        SettingsError: no such kind.
    """
    if what == "presets":
        from mbcd_cli.settings.sources import preset_purposes

        return ("preset", "purpose"), [*preset_purposes().items()]
    if what == "datasets":
        return _datasets(cache)
    if what == "encoders":
        from mbcd_cli.encoders import encoder_summaries

        return ("encoder", "reads", "what"), encoder_summaries()
    if what == "methods":
        from mbcd_cli.methods import MethodSummary, method_summaries

        columns = tuple(field.name for field in fields(MethodSummary))
        return columns, [tuple(getattr(row, column) for column in columns) for row in method_summaries()]
    raise SettingsError(
        f"There is nothing called {what!r} to list.", f"{did_you_mean(what, LISTS)}Use one of {', '.join(LISTS)}."
    )


def _datasets(cache: Path) -> tuple[tuple[str, ...], Sequence[tuple[str, ...]]]:
    from mbcd_cli.data.dataset import prepared_summaries
    from mbcd_cli.data.readers import reader_summaries

    rows = [(name, "reader", summary) for name, summary in reader_summaries()]
    for name, modalities, domains in prepared_summaries(cache):
        rows.append((name, "prepared", f"{', '.join(modalities)}; domains {', '.join(domains)}"))
    return ("dataset", "kind", "what"), rows
