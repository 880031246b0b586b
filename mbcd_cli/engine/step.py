"""One optimisation step of the objective (method.md sections 2 and 3).

Letters: B clips (of this process, where torchrun started several), M modalities, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.encoders.staged import Parts
from mbcd_cli.engine import gradient_consistency as gcc
from mbcd_cli.engine import modality_dropout as amd
from mbcd_cli.engine.feature_noise import FeatureNoise
from mbcd_cli.engine.layout import channels_last, match_layout
from mbcd_cli.engine.objective import (
    Terms,
    cross_entropy,
    distillation,
    full_precision,
    teacher_probabilities,
)
from mbcd_cli.engine.randomness import Randomness
from mbcd_cli.engine.teacher import Teacher
from mbcd_cli.model import MultiModalModel
from mbcd_cli.processes import ALONE, Group
from mbcd_cli.settings import ObjectiveSettings

_SCALARS = ("total", "ce_fused", "kl_fused", "accuracy_fused")
_PER_MODALITY = ("ce", "kl", "s", "r", "p", "dropped", "accuracy")


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step computed; tensors stay on the device and carry no graph.

    Attributes:
        total: Eq. 9, [].
        terms: every loss term.
        s, r, p: Eq. 2-4, each [M]; r is ones and p zeros where they do not apply.
        dropped: fraction of the batch whose modality k was dropped, [M].
        correct_fused: clips the student's fused branch got right in training mode, [].
        correct: the same for each uni-modal branch, [M].
        samples: B.
    """

    total: torch.Tensor
    terms: Terms
    s: torch.Tensor
    r: torch.Tensor
    p: torch.Tensor
    dropped: torch.Tensor
    correct_fused: torch.Tensor
    correct: torch.Tensor
    samples: int

    def vector(self) -> torch.Tensor:
        """All figures as one tensor [4 + 7 M] for logging without waiting for the device; see `unpack`."""
        terms, b = self.terms, self.samples
        scalars = torch.stack((self.total, terms.ce_fused, terms.kl_fused, self.correct_fused / b))
        rows = (terms.ce_unimodal, terms.kl_unimodal, self.s, self.r, self.p, self.dropped, self.correct / b)
        return torch.cat((scalars, *rows))


def unpack(vector: Sequence[float], modalities: Sequence[str]) -> dict:
    """`StepResult.vector` (or a mean of several) as a record: scalars by name, then one dict per modality."""
    count = len(modalities)
    record: dict = dict(zip(_SCALARS, vector, strict=False))
    rest = list(vector[len(_SCALARS) :])
    record["modalities"] = {
        name: {key: rest[row * count + k] for row, key in enumerate(_PER_MODALITY)} for k, name in enumerate(modalities)
    }
    return record


class TrainStep:
    """`step(batch) -> StepResult`: forward passes, gradients, one optimizer step, one teacher update.

    There is no branch on data and no wait for the device. Forward passes of the student: the first (feature
    noise, uni-modal heads) gives CE_uni, KL_uni, s_k, r_k, p_k and the inner gradient; the second (at theta', no
    noise, modality dropout) gives CE_mm and KL_mm. With neither consistency nor feature noise the two are the same
    function of the same weights, and one pass serves both. Live trunks run once for both passes, and their running
    statistics move as if they had run in each; the teacher's run in eval mode with the statistics it has averaged.

    Args:
        model: the student; tails and heads already on the device.
        settings: the objective's switches.
        optimizer: over the student's trained parameters.
        teacher: None exactly when `settings.teacher.enabled` is false.
        randomness: source of noise and masks.
        batch_norm: "tracked" (train mode; every student pass updates the running statistics) or "frozen"
            (running statistics are used and kept; affine parameters still train).
        precision: "float32" (the weights' type) or "bfloat16" (autocast; weights and losses stay float32).
        channels_last: hand inputs to the tails in the channels-last layout (their weights have it already).
        group: the processes that share the batch.
    """

    def __init__(
        self,
        *,
        model: MultiModalModel,
        settings: ObjectiveSettings,
        optimizer: torch.optim.Optimizer,
        teacher: Teacher | None,
        randomness: Randomness,
        batch_norm: str = "tracked",
        precision: str = "float32",
        channels_last: bool = False,
        group: Group = ALONE,
    ) -> None:
        self.model = model
        self.settings = settings
        self.optimizer = optimizer
        self.teacher = teacher
        self._randomness = randomness
        self._precision = precision
        self._channels_last = channels_last
        self._group = group
        self._noise = (
            FeatureNoise(settings=settings.feature_noise, randomness=randomness, group=group)
            if settings.feature_noise.enabled
            else None
        )
        self._shared_pass = settings.consistency.order == "off" and self._noise is None
        self._frozen = (
            [m for m in model.tails.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            if batch_norm == "frozen"
            else []
        )
        self._dtype = next(model.parameters()).dtype
        self._trained = [p for p in model.parameters() if p.requires_grad]
        moving = model if batch_norm == "tracked" else model.trunks
        self._statistics = [b for b in moving.buffers() if b.is_floating_point()]
        for trunk in model.trunks.values():
            trunk.update_as_if(1 if self._shared_pass else 2)
        self._theta = gcc.tail_parameters(model)
        self._head_parameters = [p for p in model.heads.parameters() if p.requires_grad]

    def __call__(self, batch: Batch) -> StepResult:
        """One step on `batch` (already on the device); updates student, optimizer and teacher in place."""
        self._train_mode()
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._prepared(batch)
        target = self._teacher_probabilities(batch)
        batch = self._at_cut(batch)
        order = self.settings.consistency.order
        if self._shared_pass:
            result = self._joint_shared(batch, target)
        elif order == "off":
            result = self._joint(batch, target)
        elif order == "first":
            result = self._first_order(batch, target)
        else:
            result = self._second_order(batch, target)
        self._group.average_([p.grad for p in self._trained if p.grad is not None])
        for parameter in self._trained:
            match_layout(parameter)
        self.optimizer.step()
        self._group.average_(self._statistics)
        if self.teacher is not None:
            self.teacher.update()
        return result

    # ---- the four ways to a gradient; each leaves it in the parameters' .grad

    def _joint_shared(self, batch: Batch, target: torch.Tensor | None) -> StepResult:
        with self._autocast(batch):
            features = self.model.features(batch.inputs)
            unimodal = self._unimodal(features)
            amd_state = self._dropout(unimodal, batch)
            fused = self.model.fuse(features, amd_state.keep)
        terms = self._terms(fused, unimodal, batch, target)
        terms.total().backward()
        return self._result(terms, amd_state, fused, unimodal, batch)

    def _joint(self, batch: Batch, target: torch.Tensor | None) -> StepResult:
        unimodal = self._first_pass(batch)
        amd_state = self._dropout(unimodal, batch)
        with self._autocast(batch):
            fused = self.model.fuse(self.model.features(batch.inputs), amd_state.keep)
        terms = self._terms(fused, unimodal, batch, target)
        terms.total().backward()
        return self._result(terms, amd_state, fused, unimodal, batch)

    def _first_order(self, batch: Batch, target: torch.Tensor | None) -> StepResult:
        """grad[CE_uni + KL_uni](theta) + grad[CE_mm + KL_mm](theta'), the inner one being its first part."""
        unimodal = self._first_pass(batch)
        amd_state = self._dropout(unimodal, batch)
        ce_unimodal, kl_unimodal = self._unimodal_losses(unimodal, batch, target)
        theta = gcc.flatten(self._theta)
        trained = [*theta, *self._head_parameters]
        gradients = list(torch.autograd.grad(ce_unimodal.sum(), trained, retain_graph=target is not None))
        self._group.average_(gradients)
        # The graph of theta' is the identity to theta, so that the fused gradient accumulates in theta's .grad.
        stepped = gcc.inner_step(self._theta, gradients[: len(theta)], alpha=self.settings.consistency.alpha)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        if target is not None:
            # Before the second pass: it frees the first one's activations.
            (self._weight * kl_unimodal.sum()).backward()
        with self._autocast(batch):
            fused = self.model.fuse(gcc.features_at(self.model, stepped, batch.inputs), amd_state.keep)
        ce_fused, kl_fused = self._fused_losses(fused, batch, target)
        (ce_fused + self._weight * kl_fused).backward()
        terms = Terms(ce_fused, ce_unimodal, kl_fused, kl_unimodal, self._weight)
        return self._result(terms, amd_state, fused, unimodal, batch)

    def _second_order(self, batch: Batch, target: torch.Tensor | None) -> StepResult:
        """The gradient of Eq. 9 with theta' a function of theta and phi_k."""
        unimodal = self._first_pass(batch)
        amd_state = self._dropout(unimodal, batch)
        ce_unimodal, kl_unimodal = self._unimodal_losses(unimodal, batch, target)
        gradients = (
            torch.autograd.grad(ce_unimodal.sum(), gcc.flatten(self._theta), create_graph=True)
            if gcc.flatten(self._theta)
            else ()
        )
        gradients = self._group.average(gradients)
        stepped = gcc.inner_step(self._theta, gradients, alpha=self.settings.consistency.alpha)
        with self._autocast(batch):
            fused = self.model.fuse(gcc.features_at(self.model, stepped, batch.inputs), amd_state.keep)
        ce_fused, kl_fused = self._fused_losses(fused, batch, target)
        terms = Terms(ce_fused, ce_unimodal, kl_fused, kl_unimodal, self._weight)
        terms.total().backward()
        return self._result(terms, amd_state, fused, unimodal, batch)

    # ---- their parts

    def _first_pass(self, batch: Batch) -> list[torch.Tensor]:
        """Uni-modal logits of the noised pass, M tensors [B, C]."""
        with self._autocast(batch):
            if self.settings.unimodal == "probe":
                with torch.no_grad():
                    features = self.model.features(batch.inputs, self._noise)
            else:
                features = self.model.features(batch.inputs, self._noise)
            return self._unimodal(features)

    def _unimodal(self, features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        if self.settings.unimodal == "probe":
            features = {name: value.detach() for name, value in features.items()}
        return list(self.model.unimodal(features).values())

    @torch.no_grad()
    def _dropout(self, unimodal: Sequence[torch.Tensor], batch: Batch) -> _Dropout:
        settings = self.settings.dropout
        s = self._group.sum_(amd.scores(unimodal, batch.labels, score=settings.score))
        r = amd.ratios(s)
        p = amd.drop_probabilities(r, settings)
        keep = None
        if settings.strategy != "none":
            keep = self._group.own(amd.keep_mask(p, len(batch) * self._group.world, self._randomness))
        return _Dropout(s=s, r=r, p=p, keep=keep)

    def _terms(
        self, fused: torch.Tensor, unimodal: Sequence[torch.Tensor], batch: Batch, target: torch.Tensor | None
    ) -> Terms:
        ce_unimodal, kl_unimodal = self._unimodal_losses(unimodal, batch, target)
        ce_fused, kl_fused = self._fused_losses(fused, batch, target)
        return Terms(ce_fused, ce_unimodal, kl_fused, kl_unimodal, self._weight)

    def _unimodal_losses(
        self, unimodal: Sequence[torch.Tensor], batch: Batch, target: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ce = torch.stack([cross_entropy(logits, batch.labels) for logits in unimodal])
        if target is None:
            return ce, torch.zeros_like(ce)
        return ce, torch.stack([distillation(target, logits) for logits in unimodal])

    def _fused_losses(
        self, fused: torch.Tensor, batch: Batch, target: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ce = cross_entropy(fused, batch.labels)
        return ce, (torch.zeros_like(ce) if target is None else distillation(target, fused))

    def _teacher_probabilities(self, batch: Batch) -> torch.Tensor | None:
        if self.teacher is None or not self.settings.distillation.enabled:
            return None
        with self._autocast(batch):
            return teacher_probabilities(self.teacher.fused_logits(batch.inputs))

    @property
    def _weight(self) -> float:
        return self.settings.distillation.weight

    def _autocast(self, batch: Batch) -> AbstractContextManager:
        enabled = self._precision == "bfloat16"
        return torch.autocast(batch.labels.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _prepared(self, batch: Batch) -> Batch:
        """Inputs in the weights' type and layout: converted once, not in every pass."""

        def prepared(part: torch.Tensor) -> torch.Tensor:
            part = part.to(self._dtype)
            return channels_last(part) if self._channels_last else part

        inputs: dict[str, Parts] = {name: tuple(map(prepared, parts)) for name, parts in batch.inputs.items()}
        return Batch(inputs=inputs, labels=batch.labels, domains=batch.domains, clips=batch.clips)

    def _at_cut(self, batch: Batch) -> Batch:
        """Through the student's live trunks, once for both passes: they would give the same, having fixed weights."""
        if not self.model.trunks:
            return batch
        with self._autocast(batch):
            inputs = self.model.at_cut(batch.inputs)
        return Batch(inputs=inputs, labels=batch.labels, domains=batch.domains, clips=batch.clips)

    def _train_mode(self) -> None:
        self.model.train()
        for module in self._frozen:
            module.eval()

    @torch.no_grad()
    def _result(
        self,
        terms: Terms,
        dropout: _Dropout,
        fused: torch.Tensor,
        unimodal: Sequence[torch.Tensor],
        batch: Batch,
    ) -> StepResult:
        terms = terms.detach()
        correct = [(full_precision(logits).argmax(dim=1) == batch.labels).sum() for logits in (fused, *unimodal)]
        return StepResult(
            total=terms.total(),
            terms=terms,
            s=dropout.s,
            r=dropout.r,
            p=dropout.p,
            dropped=torch.zeros_like(dropout.p) if dropout.keep is None else 1 - dropout.keep.mean(dim=0),
            correct_fused=correct[0],
            correct=torch.stack(correct[1:]),
            samples=len(batch),
        )


@dataclass(frozen=True, slots=True)
class _Dropout:
    """Eq. 2-4 of one batch: s, r, p [M], and the mask [B, M] or None."""

    s: torch.Tensor
    r: torch.Tensor
    p: torch.Tensor
    keep: torch.Tensor | None
