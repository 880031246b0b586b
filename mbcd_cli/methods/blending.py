"""Gradient-Blending: weights of the losses by how each branch generalises alone (Wang, Tran, Feiszli, CVPR 2020).

arXiv 1905.12681. Letters: B clips (of this process), M modalities, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, EpochClips, Figures, Method, Outputs, Term
from mbcd_cli.methods.parts import cross_entropy
from mbcd_cli.model import MultiModalModel
from mbcd_cli.settings import Count, MethodSettings

FLOOR = 1e-12
"""Least squared overfitting, and least sum of weights, that is divided by."""


class GradientBlendingSettings(MethodSettings):
    """Gradient-Blending."""

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders, or only probe detached features, to be reported."""
    epochs: Count = 10
    """Epochs that every branch trains alone, before the training, to find its weight."""


class GradientBlending(Method):
    """w_fused CE(fused) + sum_k w_k CE_k, w proportional to |G| / O^2, with sum 1, found once before the training.

    Each branch (an encoder with its head; all encoders with the fused head) trains alone from the first weights. G is
    the fall of its mean loss on the sources' test split, O the growth of that loss less its loss on training clips.
    Those are measured in eval mode, on an epoch's training batches. Heads that probe keep weight 1.
    """

    Settings = GradientBlendingSettings
    settings: GradientBlendingSettings
    ticker = ("ce_fused", "weight")
    neutral: ClassVar[Mapping[str, object]] = {"unimodal": "probe"}

    def __init__(self, settings: GradientBlendingSettings, context: Context) -> None:
        super().__init__(settings, context)
        count = len(context.model.modalities)
        self.register_buffer("of_modality", torch.full((count,), 1 / (count + 1)))
        self.register_buffer("of_fused", torch.full((), 1 / (count + 1)))

    def before_epoch(self, clips: EpochClips) -> None:
        """Find the weights, before the first epoch; draws are of a stream of their own."""
        if int(self.context.epoch) or self.settings.unimodal == "probe":
            return
        device, branches = self.context.step.device, Branches.of(self.context.model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(clips.seed + 2)
            before = self.measured(branches, clips)
            self.train_alone(branches, clips)
            after = self.measured(branches, clips)
        fused, *own = blend(before, after)
        self.of_fused.fill_(fused)
        self.of_modality.copy_(torch.tensor(own, dtype=torch.float64))

    def train_alone(self, branches: Branches, clips: EpochClips) -> None:
        """Train every branch on its own loss: no two share a parameter."""
        group, optimizers = self.context.group, []
        for model in (branches.fused, branches.own):
            optimizers.append(clips.optimizer([p for p in model.parameters() if p.requires_grad]))
        for epoch in range(self.settings.epochs):
            with closing(clips.training(epoch)) as batches:
                for batch in batches:
                    for model, optimizer in zip((branches.fused, branches.own), optimizers, strict=True):
                        clips.train_mode(model)
                        optimizer.zero_grad(set_to_none=True)
                    sum(self.losses_of(branches, batch)).backward()
                    for model, optimizer in zip((branches.fused, branches.own), optimizers, strict=True):
                        group.average_([p.grad for p in model.parameters() if p.grad is not None])
                        optimizer.step()
                        group.average_([b for b in model.buffers() if b.is_floating_point()])

    def losses_of(self, branches: Branches, batch: Batch) -> list[torch.Tensor]:
        """The mean loss of the fused branch and of each modality's, M + 1 times []."""
        with self.context.autocast():
            fused = branches.fused.fuse(branches.fused.features(branches.fused.at_cut(batch.inputs)))
            own = branches.own.unimodal(branches.own.features(branches.own.at_cut(batch.inputs)))
        return [cross_entropy(logits, batch.labels) for logits in (fused, *own.values())]

    @torch.no_grad()
    def measured(self, branches: Branches, clips: EpochClips) -> BranchLosses:
        """Mean losses on the first epoch's batches and on the test split, in eval mode."""
        branches.fused.eval()
        branches.own.eval()
        with closing(clips.training()) as training, closing(clips.validation()) as validation:
            means = self.mean(branches, training)
            (means,) = self.context.group.average([means])
            return BranchLosses(means.tolist(), self.mean(branches, validation).tolist())

    def mean(self, branches: Branches, batches: Iterator[Batch]) -> torch.Tensor:
        """Mean losses of the clips of all batches, [M + 1] in float64."""
        total, count = torch.zeros(len(self.of_modality) + 1, dtype=torch.float64), 0
        for batch in batches:
            total += len(batch) * torch.stack(self.losses_of(branches, batch)).cpu().double()
            count += len(batch)
        return total / max(count, 1)

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, weighted."""
        terms = super().losses(batch, out)
        if self.settings.unimodal == "probe":
            return terms
        return {
            "ce_fused": Term(terms["ce_fused"].value, self.of_fused),
            "ce": Term(terms["ce"].value, self.of_modality),
        }

    @torch.no_grad()
    def figures(
        self, batch: Batch, out: Outputs, loss: torch.Tensor, terms: Mapping[str, Term], **more: torch.Tensor
    ) -> Figures:
        """Those of every method and the weights, `weight` [M] and `weight_fused` []."""
        weights = {"weight_fused": self.of_fused.clone(), "weight": self.of_modality.clone()}
        return super().figures(batch, out, loss, terms, **more, **weights)


@dataclass(frozen=True, slots=True)
class Branches:
    """Two copies of a model: of one the fused head is trained, of the other each encoder by its own head."""

    fused: MultiModalModel
    own: MultiModalModel

    @classmethod
    def of(cls, model: MultiModalModel) -> Branches:
        """Copies of `model`."""
        return cls(copy.deepcopy(model), copy.deepcopy(model))


@dataclass(frozen=True, slots=True)
class BranchLosses:
    """Mean losses of the fused branch and of each modality's, M + 1 each, on training clips and on the test split."""

    training: Sequence[float]
    validation: Sequence[float]


def blend(before: BranchLosses, after: BranchLosses) -> list[float]:
    """w, M + 1 numbers with sum 1, from the losses before and after the branches trained alone."""
    weights = []
    for first, held, last, held_last in zip(
        before.training, before.validation, after.training, after.validation, strict=True
    ):
        overfitting = (held_last - last) - (held - first)
        weights.append(abs(held - held_last) / max(overfitting**2, FLOOR))
    whole = sum(weights)
    return [weight / whole if whole > FLOOR else 1 / len(weights) for weight in weights]
