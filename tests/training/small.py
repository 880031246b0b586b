"""Small float64 models for comparison with the reference step, and a randomness that remembers its draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.encoders.staged import GlobalPool, Tail, Trunk
from mbcd_cli.methods.base import Context, Method
from mbcd_cli.methods.mbcd import MBCD
from mbcd_cli.model import MultiModalModel
from mbcd_cli.processes import ALONE, Group
from mbcd_cli.randomness import Randomness
from mbcd_cli.settings import AverageSettings, ModelSettings, OptimizerSettings
from mbcd_cli.training.average import Average
from mbcd_cli.training.optimizer import build_optimizer
from mbcd_cli.training.step import TrainStep

NAMES = ("video", "audio", "flow", "extra")
CLASSES = 3
KINDS_ALL = ("conv", "two", "vector", "conv")


def conv(inside: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(inside, out, 3, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True))


def dense(inside: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, out), nn.BatchNorm1d(out), nn.ReLU(inplace=True))


class TwoPaths(nn.Module):
    def __init__(self, slow: int = 4, fast: int = 3):
        super().__init__()
        self.slow, self.fast = conv(3, slow), conv(2, fast)

    def forward(self, parts):
        return self.slow(parts[0]), self.fast(parts[1])


class TwoPool(nn.Module):
    def forward(self, parts):
        return torch.cat([part.mean(2) for part in parts], dim=1)


def tail(kind: str) -> Tail:
    noise_before = ("layer1", "pool")
    if kind == "conv":
        stages = {"input": nn.Identity(), "layer1": conv(2, 5), "pool": GlobalPool()}
        return Tail(stages, dim=5, noise_before=noise_before)
    if kind == "two":
        return Tail({"input": nn.Identity(), "layer1": TwoPaths(), "pool": TwoPool()}, dim=7, noise_before=noise_before)
    return Tail({"input": nn.Flatten(), "layer1": dense(6, 4), "pool": nn.Identity()}, dim=4, noise_before=noise_before)


@dataclass
class LentAverage:
    """The one fake of `mbcd_cli.methods.base.WeightAverage`: a model that stays as it is."""

    model: MultiModalModel
    start: int = 0

    def follow(self, module: nn.Module) -> nn.Module:
        return module


def live_trunk(kind: str) -> Trunk:
    """A frozen stage that leaves the number of channels as it is."""
    layer = {"conv": lambda: conv(2, 2), "two": lambda: TwoPaths(3, 2), "vector": lambda: dense(6, 6)}[kind]()
    return Trunk({"layer0": layer}, live=True)


def small_model(count: int, kinds, *, dropout: float = 0.0, seed: int = 3, live: bool = False) -> MultiModalModel:
    torch.manual_seed(seed)
    named = dict(zip(NAMES[:count], kinds, strict=False))
    tails = {name: tail(kind) for name, kind in named.items()}
    trunks = {name: live_trunk(kind) for name, kind in named.items()} if live else None
    settings = ModelSettings(hidden=6, dropout=dropout)
    return MultiModalModel(tails, settings=settings, classes=CLASSES, trunks=trunks).double()


def small_batch(count: int, kinds, *, size: int = 7, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(size, *shape, generator=g, dtype=torch.float64)

    shapes = {"conv": ((2, 8),), "two": ((3, 6), (2, 9)), "vector": ((6,),)}
    return Batch(
        inputs={n: tuple(draw(*s) for s in shapes[kind]) for n, kind in zip(NAMES[:count], kinds, strict=False)},
        labels=torch.randint(0, CLASSES, (size,), generator=g),
        domains=torch.zeros(size, dtype=torch.int64),
        clips=torch.arange(size),
    )


def make_step(
    model: MultiModalModel,
    kind: type[Method] = MBCD,
    settings: dict | None = None,
    *,
    average: float | None = 0.8,
    lr: float = 1e-2,
    weight_decay: float = 1e-4,
    randomness: Randomness | None = None,
    precision: str = "float32",
    group: Group = ALONE,
    capturable: bool = False,
    sources: tuple[int, ...] | list[int] = (0,),
    **options,
) -> TrainStep:
    """A step of a method with `settings`, the average being exponential with this beta, or None."""
    device = next(model.parameters()).device
    kept = None if average is None else Average(model, AverageSettings(kind="ema", beta=average))
    randomness = randomness or Randomness(seed=1, device=device)
    context = Context.of(model, randomness=randomness, average=kept, precision=precision, group=group, sources=sources)
    method = kind(kind.Settings.model_validate(settings or {}), context)
    optimizer = build_optimizer(
        [*model.parameters(), *method.parameters()],
        OptimizerSettings(lr=lr, weight_decay=weight_decay),
        groups=method.parameter_groups(),
        capturable=capturable,
    )
    return TrainStep(method=method, optimizer=optimizer, average=kept, **options)


def named(step: TrainStep, vector: torch.Tensor) -> dict[str, torch.Tensor]:
    """The figures in a step's vector by name, [] or [M]."""
    layout = step.layout
    count, first = len(layout.modalities), len(layout.scalars)
    rows = vector[first:].reshape(-1, count)
    return {**dict(zip(layout.scalars, vector, strict=False)), **dict(zip(layout.rows, rows, strict=True))}


class Recorder(Randomness):
    """Draws as usual and keeps a copy of every draw."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.draws: list[torch.Tensor] = []

    def uniform(self, *shape):
        self.draws.append(super().uniform(*shape))
        return self.draws[-1]

    def normal(self, *shape, dtype=torch.float32):
        self.draws.append(super().normal(*shape, dtype=dtype))
        return self.draws[-1]
