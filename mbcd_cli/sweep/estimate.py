"""What a sweep will cost: time from what was measured, disk from finished runs or from the number of parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.errors import CacheError, MbcdError, RunError
from mbcd_cli.files import read_json
from mbcd_cli.launch.engines import Launching
from mbcd_cli.launch.local import threads_per_job
from mbcd_cli.methods import method_class
from mbcd_cli.methods.base import Context
from mbcd_cli.model import build_model
from mbcd_cli.randomness import Randomness
from mbcd_cli.runs.folder import DONE
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.runtime import configure
from mbcd_cli.sweep.packing import kind, units
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.run import check_prepared
from mbcd_cli.sweep.search import SearchedSetting
from mbcd_cli.sweep.state import state
from mbcd_cli.training.assemble import build_average, build_method
from mbcd_cli.training.dry_run import dry_run as trial
from mbcd_cli.training.population import StackingError
from mbcd_cli.training.profiles import KEPT
from mbcd_cli.training.together import fitting_width, member_bytes, step_seconds

_FLOAT = 4  # bytes of a float32
SHORT_STEP = 0.1
"""Seconds; the time of a step shorter than that is measured three times."""


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

    @property
    def trials(self) -> list[tuple[str, int, int]]:
        """(method, modalities, domains; trials of the search; runs that report its choice); empty without a search."""
        names = [cell.name.rpartition(", ") for cell in self.cells]
        trials = Counter(what for what, _, which in names if which.startswith("trial "))
        every = Counter(what for what, _, _ in names)
        return [(what, trials[what], number - trials[what]) for what, number in every.items()] if trials else []


@dataclass(frozen=True, slots=True)
class Estimate:
    """Cost of the cells that are not done.

    Attributes:
        cells: how many they are.
        seconds: of their trainings one after another, None where nothing was measured.
        basis: where `seconds` comes from, in words.
        nbytes: disk that their run folders will take, None when unknown.
    """

    cells: int
    seconds: float | None
    basis: str
    nbytes: int | None


def group(cell: Cell) -> tuple:
    """Cells that cost the same: dataset, row of the table, modalities, number of sources."""
    settings = cell.settings
    return (settings.dataset.name, cell.label(), settings.model.modalities, len(settings.training.source_domains))


def estimate(cells: Sequence[Cell], *, measure: Callable[[Cell], float | None]) -> Estimate:
    """The cost of the cells that are not done.

    Args:
        measure: seconds of a cell's training, found by trying some steps, or None; asked once per group of cells
            that cost the same, and only where no finished run tells.
    """
    left = [cell for cell in cells if state(cell.folder) != "done"]
    finished: dict[tuple, list[float]] = {}
    for cell in cells:
        if (seconds := _seconds(cell.folder)) is not None:
            finished.setdefault(group(cell), []).append(seconds)
    seconds: dict[tuple, float | None] = {}
    tried = told = False
    for cell in left:
        key = group(cell)
        if key not in seconds:
            measured = finished.get(key)
            seconds[key] = sum(measured) / len(measured) if measured else measure(cell)
            tried |= not measured and seconds[key] is not None
            told |= bool(measured)
    total = [seconds[group(cell)] for cell in left]
    if not left:
        basis = "nothing is left to do"
    elif None in total:
        basis = "prepare the dataset first, or finish one run of each kind"
    elif tried:
        basis = "from the time of single steps, without validation and evaluation"
        basis += "; and from finished runs" if told else ""
    else:
        basis = "from finished runs (training with validation)"
    sizes = _sizes(cells, left)
    return Estimate(len(left), None if None in total else float(sum(total)), basis, sizes)


def _seconds(folder: Path) -> float | None:
    """Seconds that a finished training took; None for others and for resumed ones that only tell their last part."""
    try:
        summary = read_json(folder / DONE)
        return float(summary["steps"]) / float(summary["steps_per_second"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _sizes(cells: Sequence[Cell], left: Sequence[Cell]) -> int | None:
    finished: dict[tuple, list[int]] = {}
    for cell in cells:
        if state(cell.folder) == "done":
            size = sum(path.stat().st_size for path in cell.folder.rglob("*") if path.is_file())
            finished.setdefault(group(cell), []).append(size)
    sizes: dict[tuple, int | None] = {}
    for cell in left:
        key = group(cell)
        if key not in sizes:
            measured = finished.get(key)
            sizes[key] = sum(measured) // len(measured) if measured else checkpoint_bytes(cell)
    total = [sizes[group(cell)] for cell in left]
    return None if None in total else sum(total)


def checkpoint_bytes(cell: Cell) -> int | None:
    """Bytes of a run's two checkpoints: weights (and the teacher's) twice, the method's own and the moments once; and
    of its snapshots, after every epoch and in the last checkpoint.

    None where only `prepare` tells the shapes (array modalities, a dataset without fixed classes) and it has not run.
    """
    settings = cell.settings
    names = settings.model.modalities
    chosen, classes = {name: settings.modalities.get(name) for name in names}, settings.dataset.classes
    try:
        if not names or classes is None or any(kind is None or kind.raw for kind in chosen.values()):
            dataset = open_dataset(settings, name=str(settings.dataset.name), modalities=names)
            chosen, classes = dict(dataset.modalities), len(dataset.label_names)
        with torch.device("meta"):
            model = build_model(
                chosen, settings=settings.model, classes=classes, live_trunks=settings.cache.live_trunks
            )
            average = build_average(model, settings.average)
            context = Context.of(
                model,
                randomness=Randomness(seed=0, device=torch.device("cpu")),
                average=average,
                sources=range(len(settings.training.source_domains)),
            )
        # Not made without data: some compute tables and orders. What is left of it is.
        method = build_method(method_class(settings.method.name), settings, context)
    except MbcdError:
        return None
    weights, own = (sum(value.numel() for value in part.state_dict().values()) for part in (model, method))
    trained = sum(value.numel() for part in (model, method) for value in part.parameters() if value.requires_grad)
    moments = {"adam": 2, "adamw": 2, "sgd": 1}[settings.optimizer.name]
    models = 1 if average is None else 2
    snapshots = (len(KEPT) + 1) * (settings.training.epochs + 1) if settings.average.snapshots else 0
    return _FLOAT * ((2 * models + snapshots) * weights + own + moments * trained)


def counts(cells: Sequence[Cell]) -> Mapping[str, int]:
    """How many cells are in each state."""
    return Counter(state(cell.folder) for cell in cells)


def measure(cells: Sequence[Cell], *, jobs: int = 1) -> float | None:
    """Seconds that the training of one of these cells, which are trained together, takes, from the time of three steps;
    None where its dataset is not prepared.

    With the threads that one of `jobs` processes gets.
    """
    try:
        settings, data = open_for_training(cells[0].settings)
    except CacheError:
        return None
    threads = threads_per_job(jobs, settings.runtime.threads)
    runtime = settings.runtime.model_copy(update={"threads": threads})
    settings = settings.model_copy(update={"runtime": runtime})
    tried = [trial(settings, data)]
    if len(cells) > 1:
        # As the sweep would find out: then they go on alone.
        with suppress(RuntimeError, TypeError, StackingError, RunError):
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
    Launching(jobs=jobs).check()
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
