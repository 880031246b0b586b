"""Fill grids of losses: curves, planes, and perturbations of growing radius.

Letters: P points evaluated together, K directions of a grid (1 or 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mbcd_cli.landscape.directions import Sphere, Vector, move, move_many
from mbcd_cli.landscape.objective import LossFunction
from mbcd_cli.landscape.store import GridStore
from mbcd_cli.place import Place
from mbcd_cli.processes import ALONE

Advance = Callable[[int], None]


def fill_grid(
    store: GridStore,
    loss: LossFunction,
    directions: Sequence[Vector],
    *,
    place: Place = ALONE,
    advance: Advance = lambda steps: None,
) -> int:
    """Measure every missing point loss.start + x * directions[0] (+ y * directions[1]); returns how many.

    `place` says which points are this process'. Points are recorded pass by pass: a kill loses the pass in flight.
    """

    def measure(cells: np.ndarray) -> torch.Tensor:
        where = np.stack((store.x[cells[:, 1]], store.y[cells[:, 0]]), axis=1)[:, : len(directions)]
        if len(cells) == 1:
            return loss.measure(move(loss.start, directions, where[0]))[None]
        return loss.measure_many(move_many(loss.start, directions, torch.from_numpy(where)))

    return _fill(store, loss, measure, place, advance)


def fill_radii(
    store: GridStore,
    loss: LossFunction,
    sphere: Sphere,
    *,
    seed: int,
    place: Place = ALONE,
    advance: Advance = lambda steps: None,
) -> int:
    """Measure start + radius * (random perturbation of radius 1): x holds radii, y numbers of the random
    draws.

    Returns how many points were measured.
    """
    drawn: dict[int, Vector] = {}

    def measure(cells: np.ndarray) -> torch.Tensor:
        rows = []
        for row, column in cells:
            index = int(store.y[row])
            if index not in drawn:
                drawn.clear()  # one direction is as large as the model: keep only the last
                drawn[index] = sphere.sample(seed=seed, index=index)
            rows.append(loss.measure(move(loss.start, [drawn[index]], [store.x[column]])))
        return torch.stack(rows)

    return _fill(store, loss, measure, place, advance)


def _fill(
    store: GridStore,
    loss: LossFunction,
    measure: Callable[[np.ndarray], torch.Tensor],
    place: Place,
    advance: Advance,
) -> int:
    todo = place.share(store.missing())
    for begin in range(0, len(todo), loss.points_per_pass):
        cells = todo[begin : begin + loss.points_per_pass]
        for (row, column), (value, accuracy) in zip(cells, measure(cells).tolist(), strict=True):
            store.record(int(row), int(column), value, accuracy)
        advance(len(cells))
    return len(todo)
