"""The application: its commands, each imported when it is named, and --version."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_from_info

from mbcd_cli import __version__
from mbcd_cli.cli.help import Switches

_MARKUP = "rich"


class _Commands(Mapping):
    """name -> command, of the module of that name beside this one."""

    names = (
        "audit",
        "passport",
        "prepare",
        "train",
        "evaluate",
        "adapt",
        "zero-shot",
        "average",
        "landscape",
        "demo",
        "sweep",
        "power",
        "reveal",
        "verify",
        "repair",
        "check",
        "list",
    )

    def __getitem__(self, name: str) -> TyperCommand:
        if name not in self.names:
            raise KeyError(name)
        module = name.replace("-", "_")
        info = getattr(import_module(f"{__package__}.{module}"), module)
        return get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=_MARKUP)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Group(Switches, TyperGroup):
    def __init__(self, **attributes: object) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()


app = typer.Typer(
    name="mbcd",
    cls=_Group,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=_MARKUP,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Modality-Balanced Collaborative Distillation for multi-modal domain generalization: "
    "prepare datasets once, train from the cache, evaluate on unseen domains, look at the loss landscape.",
    epilog="Begin with [bold]mbcd demo[/bold], then [bold]mbcd list presets[/bold].",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mbcd {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _columns() -> int:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and len(columns) < 9 else 0


def main() -> None:
    """Entry point of the `mbcd` script."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a letter is no error
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands its own to what it starts
    if not 0 < _columns() < 10_000:
        os.environ.pop("COLUMNS", None)
    sys.exit(app())
