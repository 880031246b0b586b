"""Tiny trainings of a method, in memory: what its contract looks at.

Letters: B clips, M modalities, S source domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.records import Batch
from mbcd_cli.methods import checked, method_class, over_defaults
from mbcd_cli.methods.base import Method
from mbcd_cli.model import MultiModalModel, build_model
from mbcd_cli.processes import ALONE, Group
from mbcd_cli.randomness import seed_everything
from mbcd_cli.settings import ReaderSettings, Settings, Slice
from mbcd_cli.settings.sources import merge
from mbcd_cli.training.assemble import Training, train_with
from mbcd_cli.training.optimizer import build_optimizer
from mbcd_cli.training.step import TrainStep

CLASSES, DIMENSION, CLIPS = 3, 6, 12


@dataclass(frozen=True, slots=True)
class Subject:
    """A method to be checked: its class, and what is laid over the tree's defaults, by group."""

    kind: type[Method]
    method: Mapping[str, object] = field(default_factory=dict)
    average: Mapping[str, object] = field(default_factory=dict)
    model: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, method: str | type[Method], settings: Mapping[str, object] | None = None) -> Subject:
        """A method by its name in the registry, or a class; with `settings` over its defaults."""
        if isinstance(method, str):
            chosen = over_defaults(method)
            method_settings = merge(chosen["method"], settings or {})
            return cls(method_class(method), method_settings, chosen["average"], chosen["model"])
        return cls(method, settings or {}, {"kind": checked(method, method.__name__).average})

    def training(
        self,
        *,
        modalities: int = 2,
        sources: int = 2,
        dropout: float = 0.5,
        group: Group = ALONE,
        kind: type[Method] | None = None,
        order: Sequence[int] = (),
        shrunk: float = 1.0,
        optimizer: str = "adam",
        cut: str = "input",
        trunks: bool = False,
        norm: str = "layer",
        double: bool = True,
        precision: str = "float32",
        device: str = "cpu",
        **training: object,
    ) -> Training:
        """A training of a tiny model, captured in a CUDA graph (`run_step`) where the method allows it.

        Args:
            order: numbers of modalities, then of unequal widths.
            shrunk: what all settings are multiplied with that are numbers, but integers.
            cut: where the encoders' trained tails begin; trunks: the stages before it are live.
            double: weights are float64, else float32 (those that autocast to bfloat16 takes).
        """
        numbers = order or range(modalities)
        names = [f"m{k}" for k in numbers]
        array = {"kind": "array", "dimension": DIMENSION, "cut": cut}
        shapes = {f"m{k}": {**array, "width": 2 + k if order else 2} for k in numbers}
        tree = {
            "modalities": shapes,
            "model": {"hidden": 8, "dropout": dropout * shrunk, "norm": norm, "modalities": names, **self.model},
            "method": _shrunk(self.kind.Settings.model_validate(self.method), shrunk),
            "average": {"beta": 0.9 * shrunk, **self.average},
            "optimizer": {"name": optimizer, "lr": 1e-2 * shrunk, "weight_decay": 1e-3 * shrunk},
            "training": training,
            "runtime": {
                "device": device,
                "precision": precision,
                "channels_last": "off",
                "cuda_graph": "on" if device == "cuda" and self.kind.capturable else "off",
            },
        }
        settings = Settings[self.kind.Settings, ArrayModality, ReaderSettings].model_validate(tree)
        seed_everything(settings.training.seed)
        arrays = {name: ArrayModality.model_validate(shape) for name, shape in shapes.items()}
        model = build_model(arrays, settings=settings.model, classes=CLASSES, live_trunks=trunks)
        model = (model.double() if double else model).to(device)
        made = train_with(kind or self.kind, model, settings, sources=range(sources), group=group)
        if cut == "input":  # else batches are the caller's
            made.step.method.before_epoch(_ClipsOfNone(self, made.step, settings, len(names), sources))
        return made

    def batch(self, seed: int, *, modalities: int = 2, labels: torch.Tensor | None = None, sources: int = 2) -> Batch:
        """B clips, labels [B], whose class shows in every modality; with two views both of B / 2 clips."""
        generator = torch.Generator().manual_seed(seed)
        rows = CLIPS // self.kind.views
        chosen = torch.arange(rows) % CLASSES if labels is None else labels[:rows]
        centres = torch.randn(modalities, CLASSES, DIMENSION, generator=torch.Generator().manual_seed(7))
        views: list[list[torch.Tensor]] = [
            [
                (centres[k][chosen] + torch.randn(rows, DIMENSION, generator=generator)).double()
                for _ in range(self.kind.views)
            ]
            for k in range(modalities)
        ]
        repeated = torch.arange(rows).repeat_interleave(self.kind.views)
        return Batch(
            inputs={f"m{k}": (torch.stack(view, dim=1).flatten(0, 1),) for k, view in enumerate(views)},
            labels=chosen[repeated],
            domains=repeated % sources,
            clips=repeated,
        )


@dataclass(frozen=True, slots=True)
class _ClipsOfNone:
    """What a method reads before the first epoch: `methods.base.EpochClips` of batches that are drawn here."""

    subject: Subject
    step: TrainStep
    settings: Settings
    modalities: int
    sources: int
    seed: int = 0
    batches: int = 3

    def training(self, ahead: int = 0) -> Iterator[Batch]:
        group = self.step.context.group
        for seed in range(100 + 3 * ahead, 103 + 3 * ahead):
            yield own_rows(self._prepared(seed), group)

    def validation(self) -> Iterator[Batch]:
        yield from map(self._prepared, range(200, 202))

    def optimizer(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return build_optimizer(parameters, self.settings.optimizer)

    def train_mode(self, model: MultiModalModel) -> None:
        self.step.train_mode(model)

    def _prepared(self, seed: int) -> Batch:
        batch = self.subject.batch(seed, modalities=self.modalities, sources=self.sources)
        return self.step.prepared(batch.to(self.step.context.step.device))


def own_rows(batch: Batch, group: Group) -> Batch:
    """This process' rows of a batch of all."""
    rows = group.own(torch.arange(len(batch)))
    return Batch(
        inputs={name: tuple(part[rows] for part in parts) for name, parts in batch.inputs.items()},
        labels=batch.labels[rows],
        domains=batch.domains[rows],
        clips=batch.clips[rows],
    )


def _shrunk(settings: Slice, by: float) -> dict[str, object]:
    told = {name: value * by for name, value in settings if isinstance(value, float)}
    groups = {name: _shrunk(value, by) for name, value in settings if isinstance(value, Slice)}
    return settings.model_dump(mode="json", exclude_unset=True) | (told if by != 1 else {}) | groups


def weights(step: TrainStep) -> dict[str, torch.Tensor]:
    """Copies, in their own shapes, of everything that a training changes: student, average and own modules."""
    modules = {"student": step.model, "method": step.method}
    if step.average is not None:
        modules["average"] = step.average.model_for_evaluation()
    return {
        f"{part}.{name}": value.clone()
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }
