"""Straight paths and planes through checkpoints, the barrier on a path, and the plane of a training's trajectory.

Vectors hold parameters and, where running statistics are used, the batch norms' buffers, which move along with the same
coefficients (variances by their logarithms): every checkpoint is met exactly, its statistics included. Lengths and
angles are those of the parameters.

Letters: n values in a vector, t the fraction of a path that is gone, L(t) the loss there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mbcd_cli.errors import CheckpointError, SettingsError
from mbcd_cli.landscape.directions import Vector, difference, dot, move, norm, scaled
from mbcd_cli.landscape.objective import coordinate
from mbcd_cli.landscape.store import Grid


def buffers_of(model: torch.nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Floating-point buffers (running statistics) of the modules that own the parameters `names`."""
    owners = {name.rpartition(".")[0] for name in names}
    return tuple(
        name
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and name.rpartition(".")[0] in owners and name in model.state_dict()
    )


def vector_of(state: Mapping[str, torch.Tensor], like: Vector, *, label: str) -> Vector:
    """The tensors of `like` [n] out of a state dict, on its device and in its type.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    vector: Vector = {}
    for name, tensor in like.items():
        other = state.get(name)
        if other is None or other.shape != tensor.shape:
            fault = "is missing" if other is None else f"is {tuple(other.shape)}"
            raise CheckpointError(
                f"Checkpoint {label} holds another model: {name} {fault}, not {tuple(tensor.shape)}.",
                "Connect checkpoints of the same modalities, encoders and heads.",
            )
        vector[name] = coordinate(name, other.to(tensor))
    return vector


def _only(vector: Vector, names: Sequence[str]) -> Vector:
    return {name: vector[name] for name in names}


def _inner(a: Vector, b: Vector, names: Sequence[str]) -> float:
    return float(dot(_only(a, names), _only(b, names)))


def line(a: Vector, b: Vector, *, names: Sequence[str], label: str) -> Vector:
    """b - a, [n], so that a + t (b - a) is a at t = 0 and b at t = 1.

    Raises:
        SettingsError: the two are the same point.
    """
    away = difference(b, a)
    if norm(_only(away, names)) == 0:
        raise SettingsError(
            f"{label} has the same parameters as the first checkpoint.", "Choose another one, or other weights."
        )
    return away


@dataclass(frozen=True, slots=True)
class Plane:
    """A plane: origin + x * first + y * second, and where the named checkpoints lie in it.

    Attributes:
        first, second: perpendicular, equally long (x and y have the same unit).
        places: label -> (x, y).
        explained: fraction of the variance of a trajectory that each axis holds (1, 1 for exact planes).
    """

    first: Vector
    second: Vector
    places: dict[str, tuple[float, float]]
    explained: tuple[float, float] = (1.0, 1.0)

    def axes(self, points: int, *, square: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """x and y axes [points] around all places, 0.3 of the larger extent beyond them.

        `square` makes both equally long; else an axis along which the places hardly differ is half the larger extent.
        """
        places = np.array(list(self.places.values()))
        low, high = places.min(0), places.max(0)
        longest = float((high - low).max())
        least = (0.8 if square else 0.25) * longest
        room = np.maximum(0.3 * longest, least - (high - low) / 2)
        x, y = (np.linspace(a, b, points) for a, b in zip(low - room, high + room, strict=True))
        return x, y


def plane(origin: Vector, towards: Mapping[str, Vector], *, names: Sequence[str], label: str, other: Vector) -> Plane:
    """The plane through `origin` and one or two checkpoints, [n] each (Garipov et al. 2018); the first lies at (1, 0).

    With one checkpoint the second axis is the random perturbation `other`, made perpendicular and equally long.

    Raises:
        SettingsError: two of the points coincide, or all lie on one line.
    """
    (first_label, first_point), *rest = towards.items()
    first = line(origin, first_point, names=names, label=first_label)
    length = norm(_only(first, names))
    raw = line(origin, rest[0][1], names=names, label=rest[0][0]) if rest else other
    # What a random direction lacks (buffers, still biases) it does not move.
    raw = {n: (raw[n] if n in raw else torch.zeros_like(t)) for n, t in first.items()}
    along = _inner(raw, first, names) / length**2
    second = move(raw, [first], [-along])
    height = norm(_only(second, names))
    if height <= 1e-6 * length:
        raise SettingsError(
            f"{label}, {first_label} and {rest[0][0] if rest else 'the random direction'} lie on one line.",
            "Draw the path between two of them instead.",
        )
    places = {label: (0.0, 0.0), first_label: (1.0, 0.0)}
    if rest:
        places[rest[0][0]] = (along, height / length)
    return Plane(first, scaled(second, length / height), places)


def trajectory_plane(centre: Vector, steps: Mapping[str, Vector], *, names: Sequence[str], label: str) -> Plane:
    """The first two principal components of the steps' offsets from `centre` (Li et al. 2018, section 7).

    The axes [n] have unit length: eigenvectors of the steps' Gram matrix, mixed. Places are the steps' projections, the
    centre being the origin.

    Raises:
        SettingsError: fewer than two steps differ from the centre.
    """
    offsets = {name: difference(step, centre) for name, step in steps.items()}
    gram = np.array([[_inner(a, b, names) for b in offsets.values()] for a in offsets.values()])
    values, vectors = np.linalg.eigh(gram) if len(gram) else (np.zeros(0), np.zeros((0, 0)))
    if len(values) < 2 or values[-2] <= 1e-12 * max(values[-1], 1e-300):
        raise SettingsError(
            "A trajectory needs the weights of at least two more epochs that differ.",
            "Train with --set training.keep_checkpoints=true.",
        )
    axes, coordinates = [], []
    for component in (-1, -2):
        mixing = vectors[:, component] / np.sqrt(values[component])
        mixing = mixing * (1 if mixing[np.argmax(np.abs(mixing))] > 0 else -1)  # the sign is free: fix it
        zero = {n: torch.zeros_like(t) for n, t in centre.items()}
        axes.append(move(zero, list(offsets.values()), mixing.tolist()))
        coordinates.append(gram @ mixing)
    places = {name: (float(x), float(y)) for name, x, y in zip(offsets, *coordinates, strict=True)}
    explained = values[[-1, -2]] / values.sum()
    return Plane(axes[0], axes[1], {**places, label: (0.0, 0.0)}, (float(explained[0]), float(explained[1])))


@dataclass(frozen=True, slots=True)
class Barrier:
    """How much the loss on a straight path exceeds the line between its ends' losses (Frankle et al. 2020).

    Attributes:
        height: max over t of L(t) - ((1 - t) L(0) + t L(1)), at least 0; NaN when no point is finite.
        at: the t where that is.
        non_finite: points of the path without a finite loss.
    """

    height: float
    at: float
    non_finite: int


def barrier(grid: Grid) -> Barrier:
    """Barrier of a 1-D grid whose axis begins at t = 0 and ends at t = 1."""
    t, loss = grid.x, grid.loss[0]
    excess = loss - ((1 - t) * loss[0] + t * loss[-1])
    finite = np.isfinite(excess)
    if not finite.any():
        return Barrier(float("nan"), float("nan"), grid.non_finite)
    best = int(np.argmax(np.where(finite, excess, -np.inf)))
    return Barrier(max(float(excess[best]), 0.0), float(t[best]), grid.non_finite)
