"""`mbcd sweep`: plan, run, resume and collect the grid of runs behind a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mbcd_cli.errors import MbcdError, RunError, SettingsError
from mbcd_cli.evaluation.report.comparison import Comparison, write_comparison_files
from mbcd_cli.evaluation.report.plots import plot_methods
from mbcd_cli.evaluation.report.tables import Table
from mbcd_cli.files import make_folder
from mbcd_cli.launch.engines import Launching
from mbcd_cli.launch.launch import Board
from mbcd_cli.launch.unit import last_lines
from mbcd_cli.resolved import resolve
from mbcd_cli.say import SILENT, Say
from mbcd_cli.sweep import collect as collecting
from mbcd_cli.sweep import run as running
from mbcd_cli.sweep.estimate import SweepPlan, estimate_sweep
from mbcd_cli.sweep.packing import width_of
from mbcd_cli.sweep.plan import Cell, without_each_source
from mbcd_cli.sweep.request import Request, named, output_of, plan_cells, search_of, title_of
from mbcd_cli.sweep.run import SweepOutcome, prepare_named
from mbcd_cli.sweep.status import SweepStatus, status_of

HERE = Launching()
"""One process of this machine at a time."""
LISTED = 20
"""Failed runs that the error of a sweep names, with the last lines of their logs."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep returns: how its cells ended, and its tables."""

    outcome: SweepOutcome
    comparison: Comparison


def sweep(
    request: Request,
    *,
    preset: str | None,
    config: Path | None,
    sets: Sequence[str],
    flags: Mapping[str, object],
    runs_dir: Path,
    output: Path | None = None,
    how: Launching = HERE,
    pack: str = "auto",
    retry_failed: bool = False,
    dry_run: bool = False,
    status: bool = False,
    collect: bool = False,
    watch: Callable[[], AbstractContextManager[Callable[[Board], None]]] = lambda: nullcontext(lambda _: None),
    say: Say = SILENT,
) -> SweepPlan | SweepStatus | Swept:
    """Do what is asked: prepare, where `flags` have a dataset.root; plan; run what is not done; write the tables.

    Args:
        request: the grid.
        preset, config, sets, flags: the settings' layers.
        runs_dir: where run folders are. output: of the tables; None: `request.output_of`.
        how, pack, retry_failed: as `run` takes them.
        dry_run: only plan and estimate; nothing is written. status: only look. collect: only write the tables.
        watch: entered while cells run; what it gives is called with the board at every look.
        say: told what is planned and prepared.

    Raises:
        MbcdError: what is asked for cannot be, or every cell failed (`report_failures`).
    """
    how.check()
    flags = dict(flags)
    root = flags.pop("dataset.root", None)
    layers = {"preset": preset, "config": config, "sets": sets, "flags": flags}
    if root is not None and not (dry_run or status or collect):
        prepare_first(root, **layers, say=say)
    cells = plan_cells(request, **layers, runs_dir=runs_dir, say=say)
    search = search_of(request, cells, sets=sets, say=say)
    trials = [] if search is None else search.trials()
    tried = [trial.cell for trial in trials]
    if dry_run or status:
        phases = [cells] if search is None else [tried, search.expected(trials)]
        if request.leave_one_source_out:
            phases.append(_others(left_out_of(phases[-1])))
        if status:
            return status_of(list({cell.key: cell for phase in phases for cell in phase}.values()))
        planned = estimate_sweep(*phases, jobs=how.jobs, width=width_of(pack))
        return planned if search is None else replace(planned, searched=search.settings())
    where, title = output or output_of(request, cells), title_of(request, cells)
    if not collect:
        make_folder(where)
    outcome = SweepOutcome()

    def run_too(more: Sequence[Cell]) -> SweepOutcome:
        with watch() as look:
            ran = running.run(more, how=how, pack=pack, retry_failed=retry_failed, root=root, watch=look, say=say)
        done, seconds = (outcome.done or 0) + ran.done, (outcome.seconds or 0.0) + ran.seconds
        return SweepOutcome({**outcome.failed, **ran.failed}, done, seconds)

    beside_them: dict[str, Any] = {}
    if search is not None:
        if not collect:
            outcome = run_too(tried)
        choices, notes = search.choose(trials, over=not collect)
        cells = [cell for choice in choices for cell in search.reported(choice)]
        beside_them = {"notes": notes, "more": search.tables(choices), "trials": tried}
        # One that failed was a bad configuration, and is told of; where all did there is nothing to report.
        chosen = {choice.trial.base.key for choice in choices}
        lost = {str(trial.cell.folder) for trial in trials if trial.base.key not in chosen}
        outcome = replace(outcome, failed={run: why for run, why in outcome.failed.items() if run in lost})
    if not collect:
        outcome = run_too([cell for cell in cells if cell.trial is None])
    if request.leave_one_source_out:
        beside_them["left_out"] = left_out_of(cells)
        if not collect:
            others = _others(beside_them["left_out"])
            say(f"Leave one source out: {len(others)} more runs.")
            outcome = run_too(others)
    failure = report_failures(outcome)
    if failure is not None and not outcome.done:
        raise failure
    return Swept(outcome, write_tables(cells, output=where, title=title, **beside_them))


def left_out_of(cells: Sequence[Cell]) -> dict[Path, list[Cell]]:
    """Run folder of each cell -> the same trainings without each of its sources.

    Raises:
        SettingsError: none has two sources and a target.
    """
    found = {cell.folder: without_each_source(cell) for cell in cells}
    if cells and not any(found.values()):
        raise SettingsError(
            "--leave-one-source-out: no run has two sources and a target.", "Use it with --protocol multi-source."
        )
    return found


def _others(left_out: Mapping[Path, Sequence[Cell]]) -> list[Cell]:
    return list({cell.key: cell for others in left_out.values() for cell in others}.values())


def prepare_first(
    root: Path,
    *,
    preset: str | None,
    config: Path | None,
    sets: Sequence[str],
    flags: Mapping[str, object],
    say: Say = SILENT,
) -> None:
    """`mbcd prepare` for the sweep's dataset, whose media lie in `root`; what is prepared is reused.

    Raises:
        CacheError: more clips were rejected than `dataset.max_bad`.
    """
    settings = resolve(
        preset=preset, config=config, environ=os.environ, sets=sets, flags={**flags, "dataset.root": root}
    )
    prepare_named(named(settings, preset), say)


def write_tables(
    cells: Sequence[Cell],
    *,
    output: Path,
    title: str,
    notes: Sequence[str] = (),
    more: Sequence[Table] = (),
    trials: Sequence[Cell] = (),
    left_out: Mapping[Path, Sequence[Cell]] = MappingProxyType({}),
) -> Comparison:
    """The finished cells as tables, in text, Markdown, CSV, LaTeX and HTML under `output`.

    Args:
        notes, more: warnings and tables to be added. trials: cells that the page lists, and no table reads.
        left_out: `left_out_of` the cells.

    Raises:
        RunError: no cell is finished.
    """
    pairs, missing = collecting.load(cells)
    others, lacking = collecting.load(_others(left_out))
    notes = [*notes, *missing, *(f"Leave one source out: {note}" for note in lacking)]
    listed = {"Runs": cells, "Trials": trials, "Without one source": _others(left_out)}
    of_folder = {cell.folder: run for cell, run in others}
    ready = {  # where one is missing the rule says nothing
        folder: [of_folder[cell.folder] for cell in cells]
        for folder, cells in left_out.items()
        if cells and all(cell.folder in of_folder for cell in cells)
    }
    if not pairs:
        hint = "Run the sweep without --collect first; --retry-failed tries failed runs again."
        raise RunError("\n".join(["No run of this sweep is finished.", *notes]), hint)
    output.mkdir(parents=True, exist_ok=True)
    axes = collecting.axis_tables([(cell, run) for cell, run in pairs if not run.sealed])
    pictures = {table.title: plot_methods(table, output / f"{table.name}.png") for table in axes}
    return write_comparison_files(
        [run for _, run in pairs],
        [*collecting.tables(pairs), *more],
        notes=notes,
        output=output,
        title=title,
        pictures=pictures | collecting.curves(pairs, output),
        sections={heading: collecting.links(some, output) for heading, some in listed.items() if some},
        left_out=ready,
    )


def report_failures(outcome: SweepOutcome) -> MbcdError | None:
    """The error that a sweep with failed runs ends with, listing them."""
    if not outcome.failed:
        return None
    lines, number = [], len(outcome.failed)
    for folder, error in list(outcome.failed.items())[:LISTED]:
        lines.append(f"  {folder}: {error.splitlines()[0]}")
        lines += [f"    | {line}" for line in last_lines(Path(folder), 3) if line.strip() not in error]
    if number > LISTED:
        lines.append(f"  and {number - LISTED} more: --status lists them.")
    return RunError(
        "\n".join([f"{number} {'run' if number == 1 else 'runs'} failed:", *lines]),
        "RUN.log beside each folder says more; the same command with --retry-failed tries them again.",
    )
