"""`mbcd check`: flags, one library call, what it returned."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command

if TYPE_CHECKING:
    from mbcd_cli.examination import Examined


@command(
    *("dataset.root", "cache.weights_dir"),
    examples=(
        "mbcd check method my_method.py:MyMethod --set method.weight=0.2",
        "mbcd check encoder my-encoder --set modalities.video.frames=8",
        "mbcd check encoder hf:models/clip",
        "mbcd check reader my-reader --root data/mine",
    ),
)
def check(
    asked: Asked,
    part: Annotated[str, typer.Argument(help="method, encoder or reader.")],
    name: Annotated[str, typer.Argument(help="Of the registry, of an installed package; a method also FILE.py:CLASS.")],
) -> Reply:
    """Try whether a method, encoder or reader, yours or ours, does what is asked of every one.

    Methods train tiny models in memory; readers need a dataset (--root). Exit code 1 where something does not hold.
    """
    from mbcd_cli.examination import check_part

    result = check_part(part, name, config=asked.config, sets=asked.sets, flags=asked.flags, say=console.terminal)
    return result, partial(show_examined, result)


def show_examined(result: Examined) -> None:
    """Print what `check` found."""
    rows = [(one.name, "yes" if one.holds else "NO", f"{one.seconds:.1f}", one.promise) for one in result.promises]
    console.table(f"{result.part} {result.name}", ("check", "holds", "seconds", "what is asked"), rows)
    if result.cost is not None:
        cost = result.cost
        console.show(
            f"A step takes {cost.step:g} times ERM's on these tiny models; {cost.parameters} parameters of its own."
        )
    for one in result.promises:
        if not one.holds:
            console.say(f"{one.name}: {one.why} ({one.where})")
    if result.exit_code:
        console.say(
            f"error: the {result.part} does not do all that is asked of one; docs/extending.md tells what that is."
        )
