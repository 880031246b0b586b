"""Where a landscape goes: the parameters that move, directions through weight space, and their lengths.

A `Vector` maps parameter names to tensors shaped like the parameters.

Letters: n values in a vector, P points, K directions; w the weights, g a perturbation of them. A filter is a slice
along dimension 0 of a tensor with two or more dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mbcd_cli.errors import SettingsError
from mbcd_cli.model import MultiModalModel

Vector = dict[str, torch.Tensor]
Normalisation = Literal["filter", "layer", "adaptive", "relative", "absolute"]


def moving_names(model: MultiModalModel, *, group: str, loss: Literal["fused", "total"] = "fused") -> tuple[str, ...]:
    """Names of the parameters that move: trained ones only (a tail may begin with frozen stages).

    Args:
        model: the model.
        group: `all` (what the loss depends on), `tails`, `fused_head`, or a modality (its tail alone).
        loss: the fused loss does not depend on the uni-modal heads, so `all` has them only for the total
            loss.

    Raises:
        SettingsError: no such group.
    """
    if group in model.modalities:
        prefixes: tuple[str, ...] = (f"tails.{group}.",)
    elif group in ("tails", "fused_head"):
        prefixes = (f"{group}.",)
    elif group == "all":
        prefixes = ("tails.", "fused_head.", "heads.") if loss == "total" else ("tails.", "fused_head.")
    else:
        raise SettingsError(
            f"landscape.group: there is no group of parameters {group!r}.",
            f"Choose one of: all, tails, fused_head, {', '.join(model.modalities)}.",
        )
    frozen = tuple(f"tails.{m}.{stage}." for m in model.modalities for stage in getattr(model.tails[m], "frozen", ()))
    names = tuple(
        name for name, _ in model.named_parameters() if name.startswith(prefixes) and not name.startswith(frozen)
    )
    if not names:
        raise SettingsError(f"landscape.group: {group!r} holds no trainable parameters.", "Choose another group.")
    return names


def gaussian(like: Mapping[str, torch.Tensor], *, seed: int, index: int) -> Vector:
    """Standard normal noise shaped like `like` ([n] in all), the `index`-th of `seed`.

    Each tensor's noise depends on seed, index and its name alone. Drawn on the CPU, it is the same on every device, for
    every group of parameters and every checkpoint of one architecture: methods are compared along the same noise.
    """
    noise: Vector = {}
    for name, tensor in like.items():
        digest = hashlib.sha256(f"{seed}/{index}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        noise[name] = torch.randn(tensor.shape, generator=generator).to(tensor)
    return noise


def dot(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Inner product of two vectors over all names of the first, accumulated in float64: [] float64."""
    return sum((a[n].double() * b[n].double()).sum() for n in a)  # type: ignore[return-value]


def norm(a: Mapping[str, torch.Tensor]) -> float:
    """Euclidean length of a vector [n], sqrt(dot(a, a))."""
    return float(dot(a, a).sqrt())


def scaled(a: Mapping[str, torch.Tensor], factor: float) -> Vector:
    """factor * a, every tensor [...] as it was shaped."""
    return {name: tensor * factor for name, tensor in a.items()}


def difference(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> Vector:
    """a - b, [n], of two vectors with the same names."""
    return {name: a[name] - b[name] for name in a}


def move(start: Mapping[str, torch.Tensor], directions: Sequence[Vector], coefficients: Sequence[float]) -> Vector:
    """start + sum_k coefficients[k] * directions[k], [n], coefficients [K]; what a direction lacks does not move."""
    moved = dict(start)
    for direction, coefficient in zip(directions, coefficients, strict=True):
        for name, tensor in direction.items():
            moved[name] = torch.add(moved[name], tensor, alpha=float(coefficient))
    return moved


def move_many(start: Mapping[str, torch.Tensor], directions: Sequence[Vector], coefficients: torch.Tensor) -> Vector:
    """`move` to P points at once: coefficients [P, K] -> every tensor [P, ...]."""
    moved = {}
    for name, tensor in start.items():
        weights = coefficients.to(tensor)
        column = weights.reshape(*weights.shape, *([1] * tensor.dim()))
        parts = [column[:, k] * d[name] for k, d in enumerate(directions) if name in d]
        moved[name] = tensor + sum(parts) if parts else tensor.expand(len(weights), *tensor.shape)
    return moved


def _per_filter(tensor: torch.Tensor) -> torch.Tensor:
    """Norm of every filter, shaped to broadcast over the tensor."""
    return tensor.flatten(1).norm(dim=1).reshape(-1, *([1] * (tensor.dim() - 1)))


def _divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(a.dtype).tiny), torch.zeros_like(a))


@dataclass(frozen=True, slots=True)
class Sphere:
    """The perturbations g of radius 1 around the weights w; radius r is r times as far.

    - `filter` (Li et al. 2018): every filter of g is as long as that filter of w, so that scaling one layer
      up and the next one down changes nothing.
    - `layer`: every tensor of g is as long as that tensor of w.
    - `adaptive` (elementwise, as in ASAM, Kwon et al. 2021): ||g / |w||| = sqrt(n).
    - `relative`: ||g|| = ||w||.
    - `absolute` (Cha et al. 2021): ||g|| = 1.

    Args:
        start: w [n], the parameters that move.
        normalisation: one of the above.
        biases: whether tensors with fewer than two dimensions (biases, batch norm) move; each is then one
            filter.
    """

    start: Vector
    normalisation: Normalisation = "filter"
    biases: Literal["still", "move"] = "still"

    def _moving(self) -> Vector:
        moving = {n: t for n, t in self.start.items() if self.biases == "move" or t.dim() > 1}
        if not moving:
            raise SettingsError(
                "Only biases and batch-norm parameters would move, and they are kept still.",
                'Set landscape.biases = "move", or choose another group.',
            )
        return moving

    def _onto(self, g: Vector) -> Vector:
        """g scaled onto the sphere; parts that are zero stay zero."""
        moving = self._moving()
        if self.normalisation == "filter":
            result = {}
            for name, w in moving.items():
                if w.dim() > 1:
                    result[name] = _divide(g[name], _per_filter(g[name])) * _per_filter(w)
                else:
                    result[name] = _divide(g[name], g[name].norm()) * w.norm()
        elif self.normalisation == "layer":
            result = {name: _divide(g[name], g[name].norm()) * w.norm() for name, w in moving.items()}
        else:
            if self.normalisation == "adaptive":
                length = norm({n: _divide(g[n], w.abs()) for n, w in moving.items()})
                radius = sum(w.numel() for w in moving.values()) ** 0.5
            else:
                length = norm({n: g[n] for n in moving})
                radius = norm(moving) if self.normalisation == "relative" else 1.0
            result = {n: g[n] * (radius / length if length > 0 else 0.0) for n in moving}
        return result

    def sample(self, *, seed: int, index: int) -> Vector:
        """The `index`-th random perturbation [n] of radius 1 for `seed`: `gaussian` noise, for `adaptive` times |w|.

        Raises:
            SettingsError: only biases would move, and they are kept still.
        """
        noise = gaussian(self._moving(), seed=seed, index=index)
        if self.normalisation == "adaptive":
            noise = {name: noise[name] * w.abs() for name, w in self._moving().items()}
        return self._onto(noise)

    def steepest(self, gradient: Mapping[str, torch.Tensor]) -> Vector:
        """The perturbation of radius 1 along which a linear function with this gradient [n] grows most.

        It maximises sum gradient * g on the sphere, part by part for `filter` and `layer`; for `adaptive` g is
        proportional to w^2 gradient (Kwon et al. 2021).
        """
        moving = self._moving()
        if self.normalisation == "adaptive":
            return self._onto({n: gradient[n] * w.square() for n, w in moving.items()})
        return self._onto({n: gradient[n] for n in moving})

    def project(self, g: Mapping[str, torch.Tensor]) -> Vector:
        """g [n] scaled onto the sphere of radius 1 (for `filter` and `layer`, each part by itself)."""
        return self._onto(dict(g))
