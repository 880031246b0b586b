"""`mbcd power`: flags, one library call, what it returned."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import (
    Asked,
    MethodNames,
    MoreRuns,
    Reply,
    RunPatterns,
    Seeds,
    Targets,
    command,
    dataset_preset,
    with_more,
)
from mbcd_cli.errors import UsageError

if TYPE_CHECKING:
    from mbcd_cli.evaluation.power import Power

_ASSUMED = "Assumptions"


@command(
    *("dataset.name", "dataset.root"),
    preset=True,
    examples=(
        "mbcd power --preset epic-kitchens --root mm-sada-splits --targets D1",
        "mbcd power --preset av-digits --methods erm,ema,mbcd --seeds 5",
        "mbcd power --preset av-digits --runs 'runs/av-digits/*'",
    ),
)
def power(
    asked: Asked,
    targets: Targets = "all",
    methods: MethodNames = "erm,mbcd",
    seeds: Seeds = "3",
    runs: RunPatterns = None,
    more: MoreRuns = None,
    accuracy: Annotated[
        float, typer.Option("--accuracy", help="Accuracy, by which agreements are assumed.", rich_help_panel=_ASSUMED)
    ] = 0.6,
    agreement: Annotated[
        float | None,
        typer.Option(
            "--agreement", help="Share of clips that two methods both get right or wrong.", rich_help_panel=_ASSUMED
        ),
    ] = None,
    seed_agreement: Annotated[
        float | None,
        typer.Option("--seed-agreement", help="The same of two seeds of one method.", rich_help_panel=_ASSUMED),
    ] = None,
    seed_spread: Annotated[
        float | None,
        typer.Option(
            "--seed-spread",
            help="Standard deviation of the accuracy over seeds on one target: 0.015.",
            rich_help_panel=_ASSUMED,
        ),
    ] = None,
    icc: Annotated[
        float | None,
        typer.Option(
            "--icc",
            help="Correlation of two clips of one recording in which method is better: 0.02.",
            rich_help_panel=_ASSUMED,
        ),
    ] = None,
) -> Reply:
    """Tell, before training, the smallest difference between methods that test sets and seeds can show.

    With 80 % probability, at the level of 5 %, by the number of seeds.

    Of a prepared dataset; with --root, of the tables there, prepared or not.

    With --runs, agreements and spreads are measured on them. --methods takes a number, too.
    """
    from mbcd_cli.evaluation.power import power

    names, several = _parts(methods), _parts(seeds)
    try:
        compared = int(names[0]) if names[0].isdecimal() else len(names)
        count = len({int(seed) for seed in several}) if len(several) > 1 else int(several[0])
    except (IndexError, ValueError):
        count = 0
    if count < 1:
        raise UsageError(f"--methods {methods} --seeds {seeds}: nothing to train.", "Write erm,mbcd (or 2) and 3.")
    if not 0 <= accuracy <= 1:
        raise UsageError(f"--accuracy {accuracy:g} is no share.", "Give a number from 0 to 1.")
    found = power(
        asked.resolve(dataset_preset(asked), named=True),
        targets=() if targets == "all" else _parts(targets),
        seeds=count,
        methods=compared,
        runs=with_more(runs, more) or (),
        assumed={"agreement": agreement, "seed_agreement": seed_agreement, "seed_spread": seed_spread, "icc": icc},
        accuracy=accuracy,
    )
    return found, partial(show_power, found)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def show_power(found: Power) -> None:
    """Print what `power` returned."""
    counts = [*found.targets[0].smallest]
    console.table(
        f"{found.dataset}: smallest difference (points) by seeds",
        ("target", "clips", "recordings", "worth", *("endless" if count == "inf" else count for count in counts)),
        [
            (
                row.target,
                row.clips,
                row.recordings,
                f"{row.effective:.0f}",
                *("-" if value is None else f"{100 * value:.1f}" for value in row.smallest.values()),
            )
            for row in found.targets
        ],
    )
    told = found.assumptions
    each = f", each of {found.comparisons} at 5 % / {found.comparisons} (Holm)" if found.comparisons > 1 else ""
    console.show(
        found.verdict,
        f"Found with 80 % probability at 5 %{each}. Worth: so many independent clips. -: cannot be told.",
        f"Two methods agree on {told.agreement:.1%} of the clips, two seeds of one on {told.seed_agreement:.1%}; "
        f"{100 * told.seed_spread:.1f} points over seeds; correlation in a recording {told.icc:.2f} ({found.basis}).",
    )
