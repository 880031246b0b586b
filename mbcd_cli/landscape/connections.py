"""What lies between checkpoints: paths, planes and trajectories, each into its own resumable file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from mbcd_cli.landscape.analyses import (
    GridFigures,
    Measured,
    Study,
    about_of,
    along,
    directions_identity,
    grid_figures,
)
from mbcd_cli.landscape.directions import Sphere, Vector, norm
from mbcd_cli.landscape.objective import LossFunction
from mbcd_cli.landscape.paths import Plane, barrier, line, plane, trajectory_plane


@dataclass(frozen=True, slots=True)
class Ends:
    """Where paths and planes of a study lead.

    Attributes:
        loss: the loss as a function of `names` and the buffers that move along.
        names: the parameters among what moves.
        towards: label -> vector like `loss.start`, one or two.
        digests: label -> name of its weights, for the files' identity.
    """

    loss: LossFunction
    names: Sequence[str]
    towards: Mapping[str, Vector]
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PathFigures(Measured):
    """Of a straight path: losses at its ends, the barrier's height and place (0 to 1), the distance gone."""

    from_loss: float
    to_loss: float
    barrier: float
    barrier_at: float
    length: float
    non_finite: int


@dataclass(frozen=True, slots=True)
class TrajectoryFigures(GridFigures):
    """Of a training's plane: shares of variance that its axes explain, and where the epochs lie in it."""

    explained: list[float]
    places: dict[str, tuple[float, float]]


def run_path(study: Study, ends: Ends, label: str) -> PathFigures:
    """Straight path from the checkpoint to `label` -> summary with the barrier."""
    study = replace(study, loss=ends.loss)
    name = f"{study.label} to {label}"
    direction = line(study.loss.start, ends.towards[label], names=ends.names, label=label)
    grid = along(
        replace(study, label=name),
        "path",
        direction,
        x=np.linspace(0, 1, 2 * study.settings.points + 1),
        identity={"analysis": "path", "to": ends.digests[label]},
        about={"label": name, "subject": study.subject},
        marks={study.label: (0.0, 0.0), label: (1.0, 0.0)},
    )
    highest = barrier(grid)
    return PathFigures(
        file=str(grid.path),
        from_loss=float(grid.loss[0, 0]),
        to_loss=float(grid.loss[0, -1]),
        barrier=highest.height,
        barrier_at=highest.at,
        length=norm({n: direction[n] for n in ends.names}),
        non_finite=highest.non_finite,
    )


def run_plane(study: Study, ends: Ends) -> GridFigures:
    """Plane through the checkpoint and one or two others -> summary."""
    study = replace(study, loss=ends.loss)
    s = study.settings
    sphere = Sphere({n: study.loss.start[n] for n in ends.names}, s.normalisation, s.biases)
    other = sphere.sample(seed=s.seed, index=0)
    towards = dict(list(ends.towards.items())[:2])
    through = plane(study.loss.start, towards, names=ends.names, label=study.label, other=other)
    identity = {"analysis": "plane", "to": [ends.digests[label] for label in towards]}
    if len(towards) == 1:
        identity |= directions_identity(study, "plane")
    names = list(towards)
    about = {
        "x": f"to {names[0]} (1 = all the way)",
        "y": f"towards {names[1]}" if len(names) > 1 else "random direction",
    }
    return _run_plane(study, " to ".join([study.label, *names]), "plane", through, identity, about)


def run_trajectory(study: Study, ends: Ends) -> TrajectoryFigures:
    """Plane of the two principal components of the training's epochs around the checkpoint -> summary."""
    study = replace(study, loss=ends.loss)
    through = trajectory_plane(study.loss.start, ends.towards, names=ends.names, label=study.label)
    identity = {"analysis": "trajectory", "epochs": dict(ends.digests)}
    first, second = (f"component {n} ({100 * part:.0f} %)" for n, part in enumerate(through.explained, start=1))
    about = {"x": first, "y": second, "equal": False}
    figures = _run_plane(study, study.label, "trajectory", through, identity, about)
    return TrajectoryFigures(**asdict(figures), explained=list(through.explained), places=through.places)


def _run_plane(
    study: Study,
    name: str,
    analysis: str,
    through: Plane,
    identity: Mapping[str, object],
    about: Mapping[str, object],
) -> GridFigures:
    x, y = through.axes(study.settings.points, square=about.get("equal", True))
    centre = study.centre()
    study = replace(study, label=name)
    about = about_of(study, centre, **about)
    grid = along(
        study, analysis, through.first, through.second, x=x, y=y, identity=identity, about=about, marks=through.places
    )
    return grid_figures(grid, centre)
