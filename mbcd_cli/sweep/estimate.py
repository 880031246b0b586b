"""What a sweep will cost: time from what was measured, disk from finished runs or from the number of parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.errors import MbcdError
from mbcd_cli.files import read_json
from mbcd_cli.methods import method_class
from mbcd_cli.methods.base import Context
from mbcd_cli.model import build_model
from mbcd_cli.randomness import Randomness
from mbcd_cli.runs.folder import DONE
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.state import state
from mbcd_cli.training.assemble import build_average, build_method

_FLOAT = 4  # bytes of a float32


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
    """Bytes of a run's two checkpoints: weights (and the teacher's) twice, the method's own and the moments once.

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
    return _FLOAT * (2 * models * weights + own + moments * trained)


def counts(cells: Sequence[Cell]) -> Mapping[str, int]:
    """How many cells are in each state."""
    return Counter(state(cell.folder) for cell in cells)
