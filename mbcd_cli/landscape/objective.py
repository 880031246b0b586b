"""The loss as a function of weights: what surfaces, flatness and curvature are measured on.

Gains that are named here were measured on the model and clips of `tests/benchmarks/landscape_speed.py`, on and off in
turns.

Letters: N clips, B clips in a batch, P points evaluated together, C classes, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from mbcd_cli.data.records import Batch
from mbcd_cli.encoders.layout import channels_last
from mbcd_cli.encoders.staged import Parts, Stages
from mbcd_cli.errors import MbcdError
from mbcd_cli.landscape.directions import Vector
from mbcd_cli.landscape.fold import BATCH_NORMS, fold_batch_norms
from mbcd_cli.model import MultiModalModel

Result = TypeVar("Result")
BatchLoss = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
_HEAD_POINTS = 32
"""Points of a head under one vmap: 3.6 times as fast as one by one with 96 clips, 2.2 times with 480 (a fused head of
64 hidden units, one CPU thread); all clips as one batch give 1.2 and 1.8 times of it."""
_VARIANCE = ".running_var"


class LossFunction(Protocol):
    """A loss of named tensors, as the whole package needs it.

    Attributes:
        start: the tensors that move (see `coordinate`), at the checkpoint.
        points_per_pass: points that `measure_many` is best given at once.
    """

    start: Vector
    points_per_pass: int

    def measure(self, moved: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[2] float64 on the loss's device: loss and accuracy (0 to 1) at `moved`; no gradient."""

    def measure_many(self, moved: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[P, 2]: the same for P points, every tensor stacked along dimension 0."""

    def terms(self) -> Sequence[BatchLoss]:
        """Differentiable functions of the moving tensors that sum to the loss (one per batch)."""


@dataclass(slots=True)
class _Data:
    """One batch: per modality its parts at the first moving stage, or its finished features [B, D]."""

    inputs: dict[str, Parts]
    labels: torch.Tensor


class ModelObjective:
    """Cross-entropy of a model on clips kept in memory, as a function of some of its parameters or buffers.

    The model is copied, so the caller's is never changed whatever happens. What does not depend on the moving
    tensors is computed once: stages before the first one that moves, and whole tails where only heads move.

    Args:
        model: the model at the checkpoint.
        batches: the clips to measure on, as the dataset gives them.
        names: parameters (or buffers) that move.
        loss: `fused`: CE of the fused head; `total`: that plus the CE of every uni-modal head.
        batch_norm: `running` uses the running statistics (moved along where a direction holds them);
            `recalibrated` averages them anew over `calibration` at every point.
        calibration: clips for the recalibration (source-domain training clips).
        device, dtype: where and how to compute; float64 for exact curvature.
        points_per_pass: points that one vmap evaluates; 0 chooses.

    Raises:
        MbcdError: there are no clips, or none to recalibrate on.
    """

    def __init__(
        self,
        *,
        model: MultiModalModel,
        batches: Iterable[Batch],
        names: Sequence[str],
        loss: Literal["fused", "total"] = "fused",
        batch_norm: Literal["running", "recalibrated"] = "running",
        calibration: Iterable[Batch] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        points_per_pass: int = 0,
    ) -> None:
        model = copy.deepcopy(model).to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._model, self._loss, self._dtype = model, loss, dtype
        self._caller = _Caller(model)
        self._moving = [m for m in model.modalities if any(n.startswith(f"tails.{m}.") for n in names)]
        self._stages = {m: _from_first_moving(model, m, names) for m in self._moving}
        self._calibration: list[_Data] = []
        if batch_norm == "recalibrated" and _batch_norms(model.tails):
            # A batch of one clip has no variance where its positions are pooled.
            calibration = [batch for batch in calibration if len(batch) > 1]
            if not calibration:
                raise MbcdError(
                    "There are no training clips to recalibrate batch norm on.",
                    'Set landscape.batch_norm = "running".',
                )
            # Whole tails first: what does not move gets its recalibrated statistics for good.
            whole = {m: Stages({n: getattr(tail, n) for n in tail.names}) for m, tail in model.tails.items()}
            loaded = [_Data(self._at_cut(b), b.labels) for b in (batch.to(device) for batch in calibration)]
            model.load_state_dict(self._calibrated({}, loaded, whole), strict=False)
            if any(_batch_norms(stages) for stages in self._stages.values()):
                self._calibration = [self._prepare(batch, device) for batch in calibration]
        self._data = [self._prepare(batch, device) for batch in batches]
        if not self._data:
            raise MbcdError("There are no clips to measure the loss on.", "Choose other landscape.data.")
        if not self._moving:
            self._data = [_merge(self._data)]
        fold_batch_norms(model, lambda: self._sums(self._data[0])[0])
        self.clips = sum(len(data.labels) for data in self._data)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.start: Vector = {name: coordinate(name, state[name].detach()).clone() for name in names}
        self.points_per_pass = points_per_pass or (1 if self._moving else _HEAD_POINTS)

    @property
    def device(self) -> torch.device:
        """Where the loss is computed."""
        return self._data[0].labels.device

    def _cast(self, parts: Parts) -> Parts:
        return tuple(part.to(self._dtype) for part in parts)

    def _at_cut(self, batch: Batch) -> dict[str, Parts]:
        """Live trunks do not move: their batch norms keep the running statistics of the checkpoint."""
        return self._model.at_cut(batch.inputs)

    @torch.no_grad()
    def _prepare(self, batch: Batch, device: torch.device | str) -> _Data:
        """Run what never moves, once."""
        batch = batch.to(device)
        inputs: dict[str, Parts] = {}
        given = self._at_cut(batch)
        for name, tail in self._model.tails.items():
            parts = given[name]
            if name not in self._moving:
                inputs[name] = (self._model.encode(name, parts),)
                continue
            before = {n: getattr(tail, n) for n in tail.names if n not in self._stages[name].names}
            # Without a stage before, the input stays as it is cached (uint8, float16): that takes less memory.
            parts = Stages(before).run(self._cast(parts)) if before else parts
            # Contiguous inputs take 1.48 times as long on a CPU (all parameters, one thread).
            inputs[name] = tuple(map(channels_last, parts)) if batch.labels.device.type == "cpu" else parts
        return _Data(inputs, batch.labels)

    def _features(self, data: _Data) -> dict[str, torch.Tensor]:
        features = {}
        for name in self._model.modalities:
            if name in self._moving:
                (pooled,) = self._stages[name].run(self._cast(data.inputs[name]))
                features[name] = self._model.norms[name](pooled)
            else:
                (features[name],) = data.inputs[name]
        return features

    def _sums(self, data: _Data) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, correct clips) of one batch, 0-d tensors."""
        features = self._features(data)
        logits = self._model.fuse(features)
        loss = F.cross_entropy(logits, data.labels, reduction="sum")
        if self._loss == "total":
            for unimodal in self._model.unimodal(features).values():
                loss = loss + F.cross_entropy(unimodal, data.labels, reduction="sum")
        return loss, (logits.argmax(1) == data.labels).sum()

    def _call(self, tensors: Mapping[str, torch.Tensor], action: Callable[..., Result], *args: object) -> Result:
        """action(*args) while the copied model's parameters and buffers are `tensors` (not their coordinates)."""
        return functional_call(self._caller, {f"model.{n}": t for n, t in tensors.items()}, (action, *args))

    def _at(self, moved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t.exp() if n.endswith(_VARIANCE) else t for n, t in moved.items()}

    @torch.no_grad()
    def _calibrated(
        self, moved: Mapping[str, torch.Tensor], data: Sequence[_Data], stages: Mapping[str, Stages]
    ) -> Vector:
        """Batch-norm statistics of `stages` at `moved`: averages over the batches, weighted by their clips.

        As `torch.optim.swa_utils.update_bn`, but a short last batch does not count as a full one.
        """
        norms = [pair for part in stages.values() for pair in _batch_norms(part, self._model)]
        buffers: Vector = {}
        for name, module in norms:
            for buffer, tensor in module.named_buffers():
                buffers[f"{name}.{buffer}"] = torch.zeros_like(tensor)
        momenta = [module.momentum for _, module in norms]

        def run() -> None:
            seen = 0
            for batch in data:
                seen += len(batch.labels)
                for _, module in norms:
                    module.momentum = len(batch.labels) / seen
                for name, part in stages.items():
                    part.run(self._cast(batch.inputs[name]))

        try:
            for _, module in norms:
                module.train()
            self._call({**moved, **buffers}, run)
        finally:
            for (_, module), momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
                module.eval()
        return buffers

    @torch.no_grad()
    def measure(self, moved: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[2] float64: loss and accuracy at `moved`; nothing waits for the device."""
        moved = self._at(moved)
        if self._calibration:
            moved = {**moved, **self._calibrated(moved, self._calibration, self._stages)}
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for data in self._data:
            loss, correct = self._call(moved, self._sums, data)
            total += torch.stack((loss.double(), correct.double()))
        return total / self.clips

    @torch.no_grad()
    def measure_many(self, moved: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[P, 2]: loss and accuracy at P points, by one vmap unless batch norm is recalibrated."""
        points = len(next(iter(moved.values())))
        if points == 1 or self.points_per_pass == 1 or self._calibration:
            return torch.stack([self.measure({n: t[p] for n, t in moved.items()}) for p in range(points)])
        total = torch.zeros(points, 2, dtype=torch.float64, device=self.device)
        for data in self._data:
            loss, correct = torch.vmap(lambda point, d=data: self._call(self._at(point), self._sums, d))(dict(moved))
            total += torch.stack((loss.double(), correct.double()), dim=1)
        return total / self.clips

    def terms(self) -> list[BatchLoss]:
        """One differentiable term per batch; they sum to the mean loss over all clips.

        Batch norm uses the running statistics; with recalibration, those recalibrated at the checkpoint.
        """
        return [lambda moved, d=data: self._call(self._at(moved), self._sums, d)[0] / self.clips for data in self._data]


def coordinate(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """How a tensor [...] enters a vector: running variances by their logarithm, so that they stay positive wherever a
    path or a plane leads; all others as they are."""
    return tensor.clamp_min(1e-12).log() if name.endswith(_VARIANCE) else tensor


class _Caller(nn.Module):
    """Lets `functional_call` swap a model's tensors around any action on the model's modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, action: Callable[..., Result], *args: object) -> Result:
        return action(*args)


def _batch_norms(module: nn.Module, root: nn.Module | None = None) -> list[tuple[str, nn.Module]]:
    """(name in `root`, module) of every batch norm in `module` that tracks statistics."""
    inside = {id(m) for m in module.modules()}
    return [
        (name, m)
        for name, m in (root or module).named_modules()
        if id(m) in inside and isinstance(m, BATCH_NORMS) and m.running_mean is not None
    ]


def _from_first_moving(model: MultiModalModel, name: str, names: Sequence[str]) -> Stages:
    """The stages of tail `name` from the first that holds a moving tensor on."""
    tail = model.tails[name]
    moving = [any(n.startswith(f"tails.{name}.{stage}.") for n in names) for stage in tail.names]
    return Stages({stage: getattr(tail, stage) for stage in tail.names[moving.index(True) :]})


def _merge(data: Sequence[_Data]) -> _Data:
    """All clips as one batch (features only: they are small)."""
    return _Data(
        {name: (torch.cat([d.inputs[name][0] for d in data]),) for name in data[0].inputs},
        torch.cat([d.labels for d in data]),
    )
