"""`mbcd sweep`: plan, run, resume and collect the grid of runs behind a table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mbcd_cli.data.dataset import CachedDataset
from mbcd_cli.errors import CacheError, MbcdError, RunError, SettingsError
from mbcd_cli.evaluation.report.comparison import Comparison, write_comparison_files
from mbcd_cli.evaluation.report.plots import plot_methods
from mbcd_cli.evaluation.report.tables import Table
from mbcd_cli.files import make_folder
from mbcd_cli.json_values import OPTIONAL
from mbcd_cli.methods import method_class
from mbcd_cli.preparation import prepare as preparing
from mbcd_cli.resolved import resolve
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.runtime import configure
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings
from mbcd_cli.sweep import collect as collecting
from mbcd_cli.sweep import run as running
from mbcd_cli.sweep.estimate import counts, estimate
from mbcd_cli.sweep.packing import kind, units, width_of
from mbcd_cli.sweep.plan import Cell, without_each_source
from mbcd_cli.sweep.request import Request, named, output_of, plan_cells, search_of, title_of
from mbcd_cli.sweep.search import SearchedSetting
from mbcd_cli.training.dry_run import dry_run as trial
from mbcd_cli.training.population import StackingError
from mbcd_cli.training.together import check_width, fitting_width, member_bytes, step_seconds

LAUNCHERS = ("local", "slurm")
SHORT_STEP = 0.1
"""Seconds; the time of a step shorter than that is measured three times."""


@dataclass(frozen=True, slots=True)
class SweepOutcome:
    """How many cells are done, run folder -> error of failed ones, seconds that it took; empty where none was run."""

    failed: dict[str, str] = field(default_factory=dict)
    done: int | None = field(default=None, metadata=OPTIONAL)
    seconds: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep returns: how its cells ended, and its tables."""

    outcome: SweepOutcome
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell as a dry run lists it: what is trained, its run folder, the key of its settings.

    Where a search has not chosen its configuration yet, folder and key say `chosen` instead.
    """

    name: str
    run: str
    key: str


@dataclass(frozen=True, slots=True)
class PlannedPopulation:
    """Cells that are trained together.

    Attributes:
        methods: rows of the table that they belong to. modalities: that they read. runs: how many cells.
        processes: that share them. width: trainings that each has under way at a time.
        memory_bytes: what the weights, gradients, moments and averages of those take in each process.
    """

    methods: list[str]
    modalities: list[str]
    runs: int
    processes: int
    width: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What a sweep would do.

    Attributes:
        searched: settings that a search draws, and between what; empty without one.
        populations: of the cells that are trained together; empty where nothing is prepared.
        states: state -> how many cells are in it. left: how many are not done.
        seconds_one_after_another, seconds: of those, alone and `jobs` at a time; None where nothing was measured.
        basis: where the seconds come from, in words. disk_bytes: that their run folders take, None when unknown.
    """

    cells: list[PlannedCell]
    searched: list[SearchedSetting]
    populations: list[PlannedPopulation]
    states: Mapping[str, int]
    left: int
    seconds_one_after_another: float | None
    seconds: float | None
    jobs: int
    basis: str
    disk_bytes: int | None


def sweep(
    request: Request,
    *,
    preset: str | None,
    config: Path | None,
    sets: Sequence[str],
    flags: Mapping[str, object],
    runs_dir: Path,
    output: Path | None = None,
    jobs: int = 1,
    launcher: str = "local",
    slurm: Sequence[str] = (),
    pack: str = "auto",
    retry_failed: bool = False,
    dry_run: bool = False,
    collect: bool = False,
    watch: Callable[[], AbstractContextManager[Callable[[running.Board], None]]] = lambda: nullcontext(lambda _: None),
    say: Say = SILENT,
) -> SweepPlan | Swept:
    """Do what is asked: prepare, where `flags` have a dataset.root; plan; run what is not done; write the tables.

    Args:
        request: the grid.
        preset, config, sets, flags: the settings' layers.
        runs_dir: where run folders are. output: of the tables; None: `request.output_of`.
        jobs, launcher, slurm, pack, retry_failed: as `run` takes them.
        dry_run: only plan and estimate; nothing is written. collect: only write the tables.
        watch: entered while cells run; what it gives is called with the board at every look.
        say: told what is planned and prepared.

    Raises:
        MbcdError: what is asked for cannot be, or every cell failed (`report_failures`).
    """
    check_execution(jobs, launcher)
    flags = dict(flags)
    root = flags.pop("dataset.root", None)
    layers = {"preset": preset, "config": config, "sets": sets, "flags": flags}
    if root is not None and not (dry_run or collect):
        prepare_first(root, **layers, say=say)
    cells = plan_cells(request, **layers, runs_dir=runs_dir, say=say)
    search = search_of(request, cells, sets=sets, say=say)
    trials = [] if search is None else search.trials()
    tried = [trial.cell for trial in trials]
    if dry_run:
        phases = [cells] if search is None else [tried, search.expected(trials)]
        if request.leave_one_source_out:
            phases.append(_others(left_out_of(phases[-1])))
        planned = estimate_sweep(*phases, jobs=jobs, width=width_of(pack))
        return planned if search is None else replace(planned, searched=search.settings())
    where, title = output or output_of(request, cells), title_of(request, cells)
    if not collect:
        make_folder(where)
    outcome = SweepOutcome()

    def run_too(more: Sequence[Cell]) -> SweepOutcome:
        how = {"jobs": jobs, "launcher": launcher, "slurm": slurm, "pack": pack, "retry_failed": retry_failed}
        with watch() as look:
            ran = run(more, **how, root=root, watch=look, say=say)
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
    _prepare(named(settings, preset), say)


def _prepare(settings: Settings, say: Say) -> None:
    prepared = preparing.prepare(settings, say=say)
    if prepared is not None and prepared.exit_code:
        raise CacheError(
            f"More clips were rejected than dataset.max_bad = {settings.dataset.max_bad} allows.",
            "Mend the files in the table above, or raise it with --set dataset.max_bad=N.",
        )


def measure(cells: Sequence[Cell], *, jobs: int = 1) -> float | None:
    """Seconds that the training of one of these cells, which are trained together, takes, from the time of three steps;
    None where its dataset is not prepared.

    With the threads that one of `jobs` processes gets.
    """
    try:
        settings, data = open_for_training(cells[0].settings)
    except CacheError:
        return None
    threads = running.threads_per_job(jobs, settings.runtime.threads)
    runtime = settings.runtime.model_copy(update={"threads": threads})
    settings = settings.model_copy(update={"runtime": runtime})
    tried = [trial(settings, data)]
    if len(cells) > 1:
        with suppress(RuntimeError, TypeError, StackingError):  # as the sweep would find out: they go on alone
            members = [settings, *(open_for_training(cell.settings, data)[0] for cell in cells[1:])]
            return tried[0].steps * step_seconds(members, data) / len(members)
    # Whatever else the machine does shows in short steps many times over: the best of three tells.
    tried += [trial(settings, data) for _ in range(2)] if tried[0].step_seconds < SHORT_STEP else []
    return min(plan.estimated_training_seconds for plan in tried)


def estimate_sweep(*phases: Sequence[Cell], jobs: int, width: int | None = None) -> SweepPlan:
    """The plan with an estimate of its cost; nothing is written.

    Args:
        phases: cells that run when all those before are done.
        width: of populations, as `packing.units` has it.

    Raises:
        RunError: less than one job. SettingsError: as `check_prepared`.
    """
    check_execution(jobs, "local")
    together: dict[str, Sequence[Cell]] = {}
    populations: dict[str, PlannedPopulation] = {}
    cells = [cell for phase in phases for cell in phase]
    with suppress(CacheError):  # `estimate` says what is missing
        prepared = check_prepared(cells, width=width, jobs=jobs)
        for phase in phases:
            shares = units(phase, width=width, jobs=jobs, prepared=prepared)
            together |= shares
            populations |= planned_populations(shares, width=width)

    def seconds(cell: Cell) -> float | None:
        population = populations.get(cell.key)
        return measure(together[cell.key][: population.width] if population else [cell], jobs=jobs)

    cost = estimate(cells, measure=seconds)
    return SweepPlan(
        cells=[PlannedCell(cell.name, str(cell.folder), cell.key) for cell in cells],
        searched=[],
        populations=list({id(one): one for one in populations.values()}.values()),
        states=counts(cells),
        left=cost.cells,
        seconds_one_after_another=cost.seconds,
        seconds=None if cost.seconds is None else cost.seconds / jobs,
        jobs=jobs,
        basis=cost.basis,
        disk_bytes=cost.nbytes,
    )


def planned_populations(together: Mapping[str, Sequence[Cell]], *, width: int | None) -> dict[str, PlannedPopulation]:
    """Cell's key -> the population that it is part of, where there is one (`packing.units`)."""
    alike: dict[str, list[Sequence[Cell]]] = {}
    for share in {share[0].key: share for share in together.values() if len(share) > 1}.values():
        alike.setdefault(kind(share[0].settings), []).append(share)
    found = {}
    for shares in alike.values():
        settings, dataset = open_for_training(shares[0][0].settings)
        device = configure(settings.runtime)
        most = min(width or fitting_width(settings, dataset, device=device), max(map(len, shares)))
        cells = [cell for share in shares for cell in share]
        population = PlannedPopulation(
            methods=list(dict.fromkeys(cell.label() for cell in cells)),
            modalities=list(settings.modalities),
            runs=len(cells),
            processes=len(shares),
            width=most,
            memory_bytes=most * member_bytes(settings, dataset, device=device),
        )
        found |= dict.fromkeys((cell.key for cell in cells), population)
    return found


def check_execution(jobs: int, launcher: str) -> None:
    """Refuse what cannot be run.

    Raises:
        RunError: fewer than one job, or no such launcher.
    """
    if jobs < 1:
        raise RunError(f"--jobs {jobs}: at least one process is needed.", "Use --jobs 1.")
    if launcher not in LAUNCHERS:
        raise RunError(f"There is no launcher {launcher!r}.", f"Use one of {', '.join(LAUNCHERS)}.")


def check_prepared(
    cells: Sequence[Cell], *, root: Path | None = None, width: int | None = None, jobs: int = 1, say: Say = SILENT
) -> dict[str, Settings]:
    """Open every dataset and set of modalities once.

    Returns:
        Cell's key -> settings of one that reads the same data, with all that is known of it when it is prepared.

    Args:
        root: where the media lie: what some cells read otherwise than `prepare_first` found it is prepared too (sound
            that follows the frames of another modality, an axis of the grid over what is cached).
        width: trainings that each of `jobs` processes is to have under way at a time; 0, None: as many as are quick.

    Raises:
        CacheError, SettingsError: not prepared, or not as the settings say; or not so many fit into memory.
    """
    opened: dict[tuple, tuple[Settings, CachedDataset]] = {}
    fitting, prepared = set(), {}
    for cell in cells:
        settings = cell.settings
        read = (settings.dataset, settings.cache, *settings.modalities.values())
        key = (*(one.model_dump_json() for one in read), settings.model.modalities, settings.training.source_domains)
        if key not in opened:
            try:
                opened[key] = open_for_training(settings)
            except CacheError:
                if root is None:
                    raise
                _prepare(
                    settings.model_copy(update={"dataset": settings.dataset.model_copy(update={"root": root})}), say
                )
                opened[key] = open_for_training(settings)
        prepared[cell.key], dataset = opened[key]
        if width and method_class(settings.method.name).stackable and kind(settings) not in fitting:
            fitting.add(kind(settings))
            resolved, _ = open_for_training(settings, dataset)
            check_width(resolved, dataset, width=width, processes=jobs)
    return prepared


def run(
    cells: Sequence[Cell],
    *,
    jobs: int,
    launcher: str = "local",
    slurm: Sequence[str] = (),
    pack: str = "auto",
    retry_failed: bool = False,
    root: Path | None = None,
    poll: float = 0.5,
    watch: Callable[[running.Board], None] = lambda board: None,
    say: Say = SILENT,
) -> SweepOutcome:
    """Run what is not done; `write_tables` tells the results.

    Args:
        cells: of the plan.
        jobs, launcher, slurm, retry_failed: how. pack: auto, off, or how many trainings a process has under way.
        root: the dataset's folder, where what is not prepared is to be prepared.
        poll: seconds between looks at the children.
        watch: called with the board at every look.
        say: told what is prepared.

    Raises:
        CacheError: a dataset is not prepared.
        RunError: an unknown launcher, or submitit is missing.
    """
    check_execution(jobs, launcher)
    width = width_of(pack)
    prepared = check_prepared(cells, root=root, width=width, jobs=jobs, say=say)
    started = time.monotonic()
    asked = cells[0].settings.runtime.threads if cells else 0
    if launcher == "slurm":
        from mbcd_cli.sweep.slurm import submit

        packs = {"width": width, "jobs": jobs, "prepared": prepared}
        board = submit(cells, options=slurm, threads=asked, **packs, retry_failed=retry_failed, watch=watch, poll=poll)
    else:
        board = running.execute(
            cells,
            jobs=jobs,
            threads=running.threads_per_job(jobs, asked),
            width=width,
            prepared=prepared,
            gpus=_gpus(cells),
            retry_failed=retry_failed,
            watch=watch,
            poll=poll,
        )
    folders = {cell.key: str(cell.folder) for cell in cells}
    failed = {folders[key]: error for key, error in board.failed.items()}
    return SweepOutcome(failed, len(board.done), round(time.monotonic() - started, 1))


def _gpus(cells: Sequence[Cell]) -> list[str]:
    """GPUs to deal out to the processes: all that are visible where the settings say `auto` or `cuda`."""
    import torch

    if not cells or cells[0].settings.runtime.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    return visible or [str(index) for index in range(torch.cuda.device_count())]


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
    lines = [f"  {folder}: {error.splitlines()[0]}" for folder, error in outcome.failed.items()]
    number = len(lines)
    return RunError(
        "\n".join([f"{number} {'run' if number == 1 else 'runs'} failed:", *lines]),
        "RUN.log beside each folder says more; the same command with --retry-failed tries them again.",
    )
