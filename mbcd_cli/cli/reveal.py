"""`mbcd reveal`: flags, one library call, what it returned."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mbcd_cli import console
from mbcd_cli.cli.options import COMMON, Asked, Reply, RunsOrFolders, command

if TYPE_CHECKING:
    from mbcd_cli.evaluation.reveal import Revealed


@command(*COMMON, layered=False, examples=("mbcd reveal sweeps/av-digits", "mbcd reveal runs/av-digits/RUN"))
def reveal(asked: Asked, paths: RunsOrFolders) -> Reply:
    """Open the targets of runs that were trained with dataset.seal_target.

    The look is written into ledger.jsonl beside the runs; then each is evaluated.
    """
    from mbcd_cli.evaluation.reveal import reveal

    done = reveal(paths, flags=asked.flags, say=console.terminal)
    return done, partial(show_revealed, done)


def show_revealed(done: Revealed) -> None:
    """Print what `reveal` opened."""
    rows = [(Path(one.run).name, one.target, f"{100 * one.top1:.1f}") for one in done.runs]
    console.table("Revealed", ("run", "target", "top-1 (%)"), rows)
    for place, looked in done.ledgers.items():
        console.say(f"{place}: {looked}. The tables of a sweep: the same `mbcd sweep` with --collect.")
