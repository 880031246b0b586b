"""One checkpoint's analyses, each into its own resumable file.

Every function measures what its file still lacks and returns summary figures; nothing is drawn here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbcd_cli.landscape.directions import Sphere, Vector
from mbcd_cli.landscape.objective import LossFunction
from mbcd_cli.landscape.sharpness import flatness_curve, worst_case
from mbcd_cli.landscape.store import Grid, GridStore, axis, read_grid
from mbcd_cli.landscape.surface import Advance, fill_grid, fill_radii
from mbcd_cli.processes import ALONE, Group
from mbcd_cli.say import Say
from mbcd_cli.settings import LandscapeSettings


@dataclass(frozen=True, slots=True)
class Study:
    """What the analyses of one checkpoint share.

    Attributes:
        settings: the landscape slice.
        loss: the loss around the checkpoint.
        identity: what the measured values depend on, besides the analysis itself.
        folder, label: files are `folder/ANALYSIS-label.h5`.
        subject: what moves and on what it is measured, for titles.
        say: told how far each measurement is.
        curvature_loss: builds the loss in the type that curvature asks for; default: `loss` itself.
        group: the processes that share every grid.
        overwrite: start anew instead of resuming.
    """

    settings: LandscapeSettings
    loss: LossFunction
    identity: Mapping[str, object]
    folder: Path
    label: str
    subject: str
    say: Say
    curvature_loss: Callable[[], LossFunction] | None = None
    group: Group = ALONE
    overwrite: bool = False

    @property
    def sphere(self) -> Sphere:
        """Perturbations of radius 1."""
        return Sphere(self.loss.start, self.settings.normalisation, self.settings.biases)

    def file(self, analysis: str) -> Path:
        """Where `analysis` of this checkpoint is kept."""
        return file_of(self.folder, analysis, self.label)

    def centre(self) -> tuple[float, float]:
        """Loss and accuracy at the checkpoint."""
        loss, accuracy = self.loss.measure(self.loss.start).tolist()
        return loss, accuracy


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of a finished analysis; `file` holds all of it. Increases are relative to the checkpoint's loss."""

    file: str


@dataclass(frozen=True, slots=True)
class GridFigures(Measured):
    """Of a filled grid: points that were measured, without finite loss, and not measured; None without a finite one."""

    points: int
    non_finite: int
    missing: int
    mean_increase: float | None
    max_increase: float | None


@dataclass(frozen=True, slots=True)
class FlatnessFigures(Measured):
    """Of random directions, a value per radius: mean increase, half of its 95 % interval, accuracy, directions."""

    radii: list[float]
    mean_increase: list[float]
    half_width_95: list[float]
    accuracy: list[float]
    directions: list[int]
    non_finite: int


@dataclass(frozen=True, slots=True)
class WorstCaseFigures(Measured):
    """Of gradient ascent, a value per radius."""

    radii: list[float]
    increase: list[float]
    accuracy: list[float]
    non_finite: int


def file_of(folder: Path, analysis: str, label: str) -> Path:
    """`folder/ANALYSIS-label.h5`, with characters that file names do not bear replaced."""
    safe = "".join(c if c.isalnum() or c in "-_.+" else "-" for c in label)
    return folder / f"{analysis}-{safe}.h5"


def about_of(study: Study, centre: tuple[float, float], **more: object) -> dict[str, object]:
    """What plots want to know about a file."""
    centre_figures = {"centre_loss": centre[0], "centre_accuracy": centre[1]}
    distance = f"({study.settings.normalisation}-normalised)"
    return {"label": study.label, "subject": study.subject, "distance": distance, **centre_figures, **more}


def filled(
    study: Study,
    analysis: str,
    fill: Callable[[GridStore, Advance], int],
    *,
    x: np.ndarray,
    y: np.ndarray | None = None,
    identity: Mapping[str, object],
    about: Mapping[str, object],
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> Grid:
    """Open `analysis`' file, let `fill` measure what is missing, and read the whole back (on every rank).

    Args:
        study: of the checkpoint.
        fill: (store, told of every point) -> how many points it measured.
        x, y: axes [nx], [ny]; without y a single row, at 0.
        identity: what the values depend on besides `study.identity`. about, marks: of `GridStore`.

    Raises:
        StoreError: the file was measured on something else, is damaged, or is being filled.
    """
    path = study.file(analysis)
    axes = {"x": x, "y": np.zeros(1) if y is None else y}
    settings = {**axes, "identity": {**study.identity, **identity}, "about": about, "marks": marks}
    # Rank 0 owns the file, so it opens first; it folds the others' journals in when all are done.
    if not study.group.main:
        study.group.barrier()
    with GridStore(path, **settings, rank=study.group.rank, overwrite=study.overwrite) as store:
        if study.group.main:
            study.group.barrier()
        study.group.barrier()  # no process records before all have read the same file: they share what it lacks
        with study.say.progress(f"{analysis} {study.label}", len(study.group.share(store.missing()))) as ticker:
            fill(store, ticker.advance)
        study.group.barrier()
        if study.group.main and study.group.world > 1:
            store.fold(ranks=True)
    study.group.barrier()
    return read_grid(path)


def along(study: Study, analysis: str, *directions: Vector, **grid: object) -> Grid:
    """`filled` with the losses at start + x * first (+ y * second direction); `grid` is what `filled` takes."""

    def fill(store: GridStore, advance: Advance) -> int:
        return fill_grid(store, study.loss, directions, place=study.group, advance=advance)

    return filled(study, analysis, fill, **grid)


def directions_identity(study: Study, analysis: str) -> dict[str, object]:
    """What the values of an analysis along random directions depend on."""
    s = study.settings
    return {"analysis": analysis, "normalisation": s.normalisation, "biases": s.biases, "seed": s.seed}


def _axis_name(study: Study, number: int) -> str:
    return f"direction {number} ({study.settings.normalisation}-normalised)"


def run_surface(study: Study, centre: tuple[float, float]) -> GridFigures:
    """2-D plane of two random directions (Li et al. 2018); `centre` is loss and accuracy at the checkpoint."""
    s = study.settings
    coordinates = axis(s.span, s.points)
    grid = along(
        study,
        "surface",
        *(study.sphere.sample(seed=s.seed, index=index) for index in (0, 1)),
        x=coordinates,
        y=coordinates,
        identity=directions_identity(study, "surface"),
        about=about_of(study, centre, x=_axis_name(study, 1), y=_axis_name(study, 2)),
        marks={study.label: (0.0, 0.0)},
    )
    return grid_figures(grid, centre)


def run_curve(study: Study, centre: tuple[float, float]) -> GridFigures:
    """1-D line along one random direction; `centre` is loss and accuracy at the checkpoint."""
    s = study.settings
    grid = along(
        study,
        "curve",
        study.sphere.sample(seed=s.seed, index=0),
        x=axis(s.span, 4 * s.points - 1),
        identity=directions_identity(study, "curve"),
        about=about_of(study, centre, x=_axis_name(study, 1)),
        marks={study.label: (0.0, 0.0)},
    )
    return grid_figures(grid, centre)


def grid_figures(grid: Grid, centre: tuple[float, float]) -> GridFigures:
    """Figures of a filled grid around a checkpoint of this loss and accuracy."""
    finite = grid.loss[np.isfinite(grid.loss)]
    return GridFigures(
        file=str(grid.path),
        points=int(grid.computed.sum()),
        non_finite=grid.non_finite,
        missing=grid.missing,
        mean_increase=float(finite.mean() - centre[0]) if len(finite) else None,
        max_increase=float(finite.max() - centre[0]) if len(finite) else None,
    )


def run_flatness(study: Study, centre: tuple[float, float]) -> FlatnessFigures:
    """Mean loss increase over random directions of every radius (Cha et al. 2021); `centre`: loss, accuracy there."""
    s = study.settings

    def fill(store: GridStore, advance: Advance) -> int:
        return fill_radii(store, study.loss, study.sphere, seed=s.seed, place=study.group, advance=advance)

    grid = filled(
        study,
        "flatness",
        fill,
        x=np.array(sorted(set(s.radii))),
        y=np.arange(s.directions, dtype=float),
        identity=directions_identity(study, "flatness"),
        about=about_of(study, centre),
    )
    curve = flatness_curve(grid, centre=centre[0])
    return FlatnessFigures(
        file=str(grid.path),
        radii=curve.radii.tolist(),
        mean_increase=curve.mean.tolist(),
        half_width_95=curve.half_width.tolist(),
        accuracy=curve.accuracy.tolist(),
        directions=curve.directions.tolist(),
        non_finite=curve.non_finite,
    )


def run_worst_case(study: Study, centre: tuple[float, float]) -> WorstCaseFigures:
    """Largest loss increase that gradient ascent finds at every radius; `centre`: loss, accuracy at the checkpoint."""
    s = study.settings

    def fill(store: GridStore, advance: Advance) -> int:
        todo = study.group.share(store.missing())
        for row, column in todo:
            loss, accuracy = worst_case(
                study.loss, study.sphere, radius=float(store.x[column]), steps=s.ascent_steps, seed=s.seed
            )
            store.record(int(row), int(column), loss, accuracy)
            advance(1)
        return len(todo)

    grid = filled(
        study,
        "worst_case",
        fill,
        x=np.array(sorted(set(s.radii))),
        identity={**directions_identity(study, "worst_case"), "ascent_steps": s.ascent_steps},
        about=about_of(study, centre),
    )
    return WorstCaseFigures(
        file=str(grid.path),
        radii=grid.x.tolist(),
        increase=(grid.loss[0] - centre[0]).tolist(),
        accuracy=grid.accuracy[0].tolist(),
        non_finite=grid.non_finite,
    )
