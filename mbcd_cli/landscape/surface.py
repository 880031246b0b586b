"""Fill grids of losses: curves, planes, and perturbations of growing radius.

Letters: P points evaluated together, K directions of a grid (1 or 2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from mbcd_cli.landscape.directions import Sphere, Vector, move, move_many
from mbcd_cli.landscape.objective import LossFunction
from mbcd_cli.landscape.store import GridStore

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of a grid this process computes: every `world`-th missing point from the `rank`-th on."""

    rank: int = 0
    world: int = 1

    def of(self, todo: np.ndarray) -> np.ndarray:
        """This process' rows of `todo`."""
        return todo[self.rank :: self.world]


@contextmanager
def sharing() -> Iterator[tuple[Share, Callable[[], None]]]:
    """This process' share of every grid and a barrier, from torch.distributed (as `torchrun` starts it),
    else alone.

    Nothing but barriers is exchanged, so gloo serves processes with and without GPUs.
    """
    opened = False
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The others wait while rank 0 computes what is not shared.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
        opened = True
    try:
        if dist.is_initialized():
            yield Share(dist.get_rank(), dist.get_world_size()), dist.barrier
        else:
            yield Share(), lambda: None
    finally:
        if opened:
            dist.destroy_process_group()


def fill_grid(
    store: GridStore,
    loss: LossFunction,
    directions: Sequence[Vector],
    *,
    origin: Vector | None = None,
    share: Share | None = None,
    advance: Advance = lambda steps: None,
) -> int:
    """Measure every missing point origin + x * directions[0] (+ y * directions[1]); returns how many.

    `origin` is the loss's `start` unless told. Points are recorded pass by pass: a kill loses the pass in
    flight.
    """
    origin = loss.start if origin is None else origin

    def measure(cells: np.ndarray) -> torch.Tensor:
        where = np.stack((store.x[cells[:, 1]], store.y[cells[:, 0]]), axis=1)[:, : len(directions)]
        if len(cells) == 1:
            return loss.measure(move(origin, directions, where[0]))[None]
        return loss.measure_many(move_many(origin, directions, torch.from_numpy(where)))

    return _fill(store, loss, measure, share or Share(), advance)


def fill_radii(
    store: GridStore,
    loss: LossFunction,
    sphere: Sphere,
    *,
    seed: int,
    share: Share | None = None,
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

    return _fill(store, loss, measure, share or Share(), advance)


def _fill(
    store: GridStore,
    loss: LossFunction,
    measure: Callable[[np.ndarray], torch.Tensor],
    share: Share,
    advance: Advance,
) -> int:
    todo = share.of(store.missing())
    for begin in range(0, len(todo), loss.points_per_pass):
        cells = todo[begin : begin + loss.points_per_pass]
        for (row, column), (value, accuracy) in zip(cells, measure(cells).tolist(), strict=True):
            store.record(int(row), int(column), value, accuracy)
        advance(len(cells))
    return len(todo)
