"""Help of commands: switches without a type, examples that can be copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand


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
    """The class of a command whose help ends with lines that a user can type, each unbroken."""

    class Command(Switches, TyperCommand):
        def format_help(self, ctx: typer.Context, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            formatter.write("\n".join([" Examples:", *(f"   {line}" for line in examples)]))

    return Command
