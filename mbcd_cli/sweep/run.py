"""Running a sweep's cells: which units they are, and what is there before they begin."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mbcd_cli.data.dataset import CachedDataset
from mbcd_cli.errors import CacheError
from mbcd_cli.files import write_text
from mbcd_cli.json_values import OPTIONAL
from mbcd_cli.launch.engines import Launching
from mbcd_cli.launch.launch import Board, begin, last_line, launch
from mbcd_cli.launch.unit import Order, State, beside, read_failure
from mbcd_cli.methods import method_class
from mbcd_cli.preparation import prepare as preparing
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings
from mbcd_cli.settings.sources import to_toml
from mbcd_cli.sweep.packing import kind, units, width_of
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.state import state
from mbcd_cli.training.together import check_width

CELL = "mbcd_cli.sweep.cell:serve_cell"
"""Trains and evaluates one cell: (RUN_FOLDER, THREADS)."""
PACK = "mbcd_cli.sweep.pack:serve_pack"
"""Does so with several, as one population: (THREADS, WIDTH, RUN_FOLDER, ...)."""


@dataclass(frozen=True, slots=True)
class SweepOutcome:
    """How many cells are done, run folder -> error of failed ones, seconds that it took; empty where none was run."""

    failed: dict[str, str] = field(default_factory=dict)
    done: int | None = field(default=None, metadata=OPTIONAL)
    seconds: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class CellUnit:
    """A cell, or several that one process trains together, as a unit of work.

    Attributes:
        width: trainings of a population under way at a time; None: as many as are quick.
    """

    pieces: Sequence[Cell]
    width: int | None = 0

    def order(self, threads: int) -> Order:
        """What its process is told; its log is the first's `X.log`."""
        folders = tuple(str(cell.folder.absolute()) for cell in self.pieces)
        log = str(beside(self.pieces[0].folder, "log").absolute())
        if len(folders) == 1:
            return Order(CELL, (folders[0], str(threads)), log)
        return Order(PACK, (str(threads), str(self.width or 0), *folders), log, large=True)

    def write(self, piece: Cell) -> None:
        """Write the settings that the cell's process reads, whole or not at all; again before each of them begins.

        Raises:
            FileError: the folder cannot be written to.
        """
        write_text(
            beside(piece.folder, "toml"), to_toml(piece.settings, stamped=True), lasting=False, place="--runs-dir"
        )

    def state(self, piece: Cell) -> State:
        """Where the cell stands."""
        return state(piece.folder)

    def error(self, piece: Cell) -> str:
        """Why the cell failed."""
        return read_failure(piece.folder) or last_line(piece)


def check_prepared(
    cells: Sequence[Cell], *, root: Path | None = None, width: int | None = None, jobs: int = 1, say: Say = SILENT
) -> dict[str, Settings]:
    """Open every dataset and set of modalities once.

    Returns:
        Cell's key -> settings of one that reads the same data, with all that is known of it when it is prepared.

    Args:
        root: where the media lie: what some cells read otherwise than `prepare_named` found it is prepared too (sound
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
                dataset = settings.dataset.model_copy(update={"root": root})
                prepare_named(settings.model_copy(update={"dataset": dataset}), say)
                opened[key] = open_for_training(settings)
        prepared[cell.key], dataset = opened[key]
        if width and method_class(settings.method.name).stackable and kind(settings) not in fitting:
            fitting.add(kind(settings))
            resolved, _ = open_for_training(settings, dataset)
            check_width(resolved, dataset, width=width, processes=jobs)
    return prepared


def prepare_named(settings: Settings, say: Say) -> None:
    """`mbcd prepare` of the dataset that the settings name.

    Raises:
        CacheError: more clips were rejected than `dataset.max_bad`.
    """
    prepared = preparing.prepare(settings, say=say)
    if prepared is not None and prepared.exit_code:
        raise CacheError(
            f"More clips were rejected than dataset.max_bad = {settings.dataset.max_bad} allows.",
            "Mend the files in the table above, or raise it with --set dataset.max_bad=N.",
        )


def run(
    cells: Sequence[Cell],
    *,
    how: Launching,
    pack: str = "auto",
    retry_failed: bool = False,
    root: Path | None = None,
    poll: float = 0.5,
    watch: Callable[[Board], None] = lambda board: None,
    say: Say = SILENT,
) -> SweepOutcome:
    """Run what is not done; `sweep.write_tables` tells the results.

    Args:
        cells: of the plan.
        pack: auto, off, or how many trainings a process has under way.
        retry_failed: run failed cells again.
        root: the dataset's folder, where what is not prepared is to be prepared.
        poll: seconds between looks at the children.
        watch: called with the board at every look.
        say: told what is prepared, and what a cluster says.

    Raises:
        CacheError: a dataset is not prepared.
        RunError: an unknown launcher, or a library of a launcher is missing.
    """
    how.check()
    width = width_of(pack)
    prepared = check_prepared(cells, root=root, width=width, jobs=how.jobs, say=say)
    started = time.monotonic()
    shares = units(cells, width=width, jobs=how.jobs, prepared=prepared)
    wanted = [CellUnit(share, width) for share in {share[0].key: share for share in shares.values()}.values()]
    board = begin(wanted, retry_failed=retry_failed)
    if not board.waiting:
        watch(board)
    else:
        caches = {cell.settings.cache.dir / str(cell.settings.dataset.name) for cell in cells}
        engine = how.engine(cells[0].settings, cells[0].folder.parent, sees=sorted(caches), say=say)
        launch(board, engine, watch=watch, poll=poll)
    folders = {cell.key: str(cell.folder) for cell in cells}
    failed = {folders[key]: error for key, error in board.failed.items()}
    return SweepOutcome(failed, len(board.done), round(time.monotonic() - started, 1))
