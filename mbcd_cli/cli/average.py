"""`mbcd average`: flags, one library call, what it returned."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.evaluate import print_tables, show_comparison
from mbcd_cli.cli.options import Asked, Output, Reply, RunsOrFolders, command
from mbcd_cli.errors import UsageError

if TYPE_CHECKING:
    from mbcd_cli.averaging.average_runs import AveragesMade, Valley

_SOUPS, _STATISTICS = ("uniform", "greedy", "restricted"), ("averaged", "recomputed")


@command(
    examples=(
        "mbcd average RUN --profile 0.1",
        "mbcd average RUN --window 5..9 --statistics recomputed",
        "mbcd average runs/av-digits-vectors --soup greedy",
        "mbcd average RUN --swad --valley 2,3,1.2",
        "mbcd average runs/av-digits-vectors --study",
    ),
)
def average(
    asked: Asked,
    paths: RunsOrFolders,
    profile: Annotated[
        float | None, typer.Option("--profile", help="Relative width of the average, 0.1 say: of a power function.")
    ] = None,
    window: Annotated[str | None, typer.Option("--window", help="Mean over the steps of these epochs: 5..9.")] = None,
    swad: Annotated[bool, typer.Option("--swad", help="Mean over the valley of the source-validation loss.")] = False,
    published: Annotated[bool, typer.Option("--published", help="swad: as its authors' code counts.")] = False,
    valley: Annotated[
        str | None,
        typer.Option("--valley", help="swad: N_s,N_e,r in place of average.converge, leave and tolerance."),
    ] = None,
    soup: Annotated[
        str | None, typer.Option("--soup", help=f"Mean of several runs. One of: {', '.join(_SOUPS)}.")
    ] = None,
    statistics: Annotated[
        str,
        typer.Option("--statistics", help="Of batch norms: averaged, or recomputed on the sources' training clips."),
    ] = "averaged",
    study: Annotated[
        bool, typer.Option("--study", help="Compare them all: target accuracy and flatness by method, one figure.")
    ] = False,
    output: Output = None,
) -> Reply:
    """Average the weights of finished runs: over their epochs, or over runs that began alike.

    Makes a run folder that evaluate, landscape and adapt take as any other. Only --study reads targets.

    Epochs need runs trained with --set average.snapshots=true, soups --set training.init_seed=0.

    Without --output it is beside the run; a study's tables go into averages.
    """
    rules = {"--profile": profile, "--window": window, "--swad": swad or None, "--soup": soup, "--study": study or None}
    if sum(value is not None for value in rules.values()) != 1:
        raise UsageError("Say what to average.", f"Use one of {', '.join(rules)}.")
    if (published or valley) and not swad:
        raise UsageError("--published and --valley are of SWAD.", "Use them with --swad.")
    for flag, value, choices in (
        ("--soup", _SOUPS[0] if soup is None else soup, _SOUPS),
        ("--statistics", statistics, _STATISTICS),
    ):
        if value not in choices:
            raise UsageError(f"{flag} {value}: there is no such rule.", f"Choose one of: {', '.join(choices)}.")
    from mbcd_cli.averaging.average_runs import Valley, WantedAverage, average
    from mbcd_cli.averaging.study import study_averages

    layers = {"config": asked.config, "sets": asked.sets, "flags": asked.flags, "say": console.terminal}
    if study:
        compared = study_averages(paths, statistics=statistics, output=output, **layers)
        return compared, partial(show_comparison, compared)
    wanted = WantedAverage(
        profile=profile,
        window=None if window is None else _epochs(window),
        valley=_constants(Valley, valley, published=published) if swad else None,
        soup=soup,
        statistics=statistics,
    )
    made = average(paths, wanted, output=output, **layers)
    return made, partial(show_averages, made)


def _epochs(text: str) -> tuple[int, int]:
    """`5..9` -> (5, 9)."""
    found = re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", text.strip())
    if found is None:
        raise UsageError(f"--window {text}: no window of epochs.", "Write first and last, such as 5..9.")
    return int(found[1]), int(found[2])


def _constants(kind: type[Valley], text: str | None, *, published: bool) -> Valley:
    """`3,6,1.3` -> N_s, N_e and r."""
    if text is None:
        return kind(published=published)
    try:
        converge, leave, tolerance = text.split(",")
        valley = kind(int(converge), int(leave), float(tolerance), published)
    except ValueError:
        raise UsageError(f"--valley {text}: not N_s,N_e,r.", "Write three numbers, such as 3,6,1.3.") from None
    if valley.converge < 1 or valley.leave < 1 or not 1 <= valley.tolerance < float("inf"):
        raise UsageError(f"--valley {text}: no valley has these.", "N_s and N_e are 1 or more, and so is r.")
    return valley


def show_averages(made: AveragesMade) -> None:
    """Print what `average` returned: a row per average, warnings, and where they are."""
    from mbcd_cli.evaluation.report.tables import Score, Table

    rows: list[list[str | Score]] = []
    for one in made.averages:
        fit = None if one.recipe is None else one.recipe.fit
        kept = "-" if one.recipe else f"{sum(of.weight > 0 for of in one.of)} runs"
        if one.recipe is not None and one.recipe.epochs is not None:
            kept = "{}..{}".format(*one.recipe.epochs)
        distance = "-" if fit is None else f"{fit.distance:.3f}"
        scores = [Score(100 * one.trained.accuracy), Score(100 * one.validation.accuracy)]
        rows.append([one.method, str(one.seed), one.label, kept, distance, one.statistics.source, *scores])
    columns = ["method", "seed", "average", "kept", "L1", "statistics", "as trained (%)", "averaged (%)"]
    note = (
        "Kept: epochs, or a soup's runs. Accuracy on the sources' held-out clips. L1: distance of the profile from the "
        "one that was asked for."
    )
    warnings = [f"{one.run}: {text}" for one in made.averages for text in one.warnings]
    print_tables([Table("averages", "Averages after the fact", columns, rows, note)], warnings)
    for one in made.averages:
        console.show(f"mbcd evaluate --run {one.run}")
