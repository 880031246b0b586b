"""Help of commands: switches without a type, examples that can be copied, the settings of a method that is named."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill, wrap
from typing import Any

import typer
from typer.core import TyperCommand

from mbcd_cli.errors import MbcdError
from mbcd_cli.files import flatten


class Switches:
    """Of a command: its switches, which take no value, name no type of it."""

    def get_params(self, ctx: typer.Context) -> list[Any]:
        """Its parameters, as typer lists them."""
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False):
                param.display_type_rich = lambda ctx: None
        return params


def command_with(examples: Sequence[str]) -> type[TyperCommand]:
    """The class of a command whose help ends with lines that a user can type, each unbroken.

    Where the command line names a method, its settings, and no other method's, come before them.
    """

    class Command(Switches, TyperCommand):
        def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
            ctx.meta[_ARGUMENTS] = [*args]
            return super().parse_args(ctx, args)

        def format_help(self, ctx: typer.Context, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            formatter.write("\n".join(_settings_of(_named(ctx.meta[_ARGUMENTS], "--method"))))
            formatter.write("\n".join([" Examples:", *(f"   {line}" for line in examples)]))

    return Command


_ARGUMENTS = "mbcd.arguments"


def _named(arguments: Sequence[str], option: str) -> str | None:
    """The value that a command line gives an option, before anything is parsed."""
    for at, word in enumerate(arguments):
        if word == option:
            return next(iter(arguments[at + 1 :]), None)
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _settings_of(method: str | None) -> list[str]:
    if method is None:
        return []
    from mbcd_cli.methods import method_class, over_defaults
    from mbcd_cli.settings.described import described

    try:
        rows, chosen = described(method_class(method).Settings, "method."), over_defaults(method)
    except MbcdError as error:
        return [*fill(f"--method {method}: {error}", 78).splitlines(), ""]
    lines = [f" Settings of {method} (--set NAME=VALUE):"]
    over = flatten(chosen)
    for row in rows:
        if row.path != "method.name":
            default = over.get(row.path, row.default)
            default = str(default).lower() if isinstance(default, bool) else default
            told = f"{row.path}  {row.type.replace('`', '')}" + (f"  [default: {default}]" if default != "" else "")
            lines += wrap(told, 78, initial_indent=" " * 3, subsequent_indent=" " * 6)
            lines += wrap(row.meaning.replace("`", ""), 78, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [*lines, "", ""]
