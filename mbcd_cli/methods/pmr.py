"""PMR: prototypical modal rebalance (Fan et al., CVPR 2023), any M.

Letters: B clips (of this process), M modalities, C classes, D_k features of modality k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from mbcd_cli.data.records import Batch
from mbcd_cli.methods import modality_dropout as amd
from mbcd_cli.methods.base import Context, EpochClips, Figures, Method, Outputs, Term
from mbcd_cli.methods.parts import cross_entropy, full_precision
from mbcd_cli.settings import AROUND, Fraction, MethodSettings, NonNegative

FAR = -1e9
"""Similarity to a class that has no prototype."""


class PMRSettings(MethodSettings):
    """PMR."""

    alpha: Annotated[NonNegative, AROUND] = 1.0
    """Weight of the prototypes' loss of the slower modalities (the authors': 1, or 2 in most commands)."""
    share: Fraction = 0.1
    """Share of an epoch's batches that prototypes are means of; more, until every class has come."""
    memory: Fraction = 0.2
    """m, how much of a prototype stays from one epoch to the next (0 in most of the authors' commands)."""
    stop: Annotated[int, Field(ge=0)] = 70
    """Epochs after which the prototypes' loss has ended."""


class PMR(Method):
    """CE(fused) + sum_k b_k CE(-||h_k - c_k||_2), b_k = alpha where s_k < max_j s_j, else 0.

    c_k [C, D_k] are class means of h_k in eval mode, taken anew before every epoch over its first batches and mixed
    with those before; s_k is the mean probability of the true class in softmax_c(-||h_k - c_k[c]||_2). Prototypes and
    s_k are constants for the gradient.
    """

    Settings = PMRSettings
    settings: PMRSettings
    ticker = ("ce_fused", "pace")

    def __init__(self, settings: PMRSettings, context: Context) -> None:
        super().__init__(settings, context)
        classes = context.model.classes
        for name, dim in context.model.dims.items():
            self.register_buffer(f"prototypes_{name}", torch.zeros(classes, dim))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    @torch.no_grad()
    def before_epoch(self, clips: EpochClips) -> None:
        """Prototypes from the first batches."""
        if int(self.context.epoch) >= self.settings.stop:
            return
        with closing(clips.training()) as batches:
            sums, counts = self.sums(batches, least=self.settings.share * clips.batches)
        here = counts > 0
        for name, total in sums.items():
            fresh, old = total / counts.clamp(min=1)[:, None], self.get_buffer(f"prototypes_{name}")
            mixed = torch.where(self.seen[:, None], fresh + self.settings.memory * (old - fresh), fresh)
            old.copy_(torch.where(here[:, None], mixed, old))
        self.seen |= here

    def sums(self, batches: Iterator[Batch], *, least: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Sums of features by class, each [C, D_k], and clips of each class, [C], of `least` batches or more."""
        model, group = self.context.model.eval(), self.context.group
        sums = {name: torch.zeros_like(self.get_buffer(f"prototypes_{name}")) for name in model.modalities}
        counts = torch.zeros(model.classes, dtype=next(iter(sums.values())).dtype, device=self.seen.device)
        for number, batch in enumerate(batches):
            if number >= least and bool((counts > 0).all()):
                break
            with self.context.autocast():
                features = model.features(self.at_cut(batch).inputs)
            of_class = F.one_hot(group.gather(batch.labels), model.classes).to(counts.dtype)
            counts += of_class.sum(dim=0)
            for name, h in features.items():
                sums[name] += of_class.T @ group.gather(full_precision(h))
        return sums, counts

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms and `prototype` [M], with weight for the slower modalities."""
        similar = self.similarities(out)
        ce = torch.stack([cross_entropy(logits, batch.labels) for logits in similar])
        slower = is_slower(self.paces(similar, batch)) & (self.context.epoch < self.settings.stop)
        return super().losses(batch, out) | {"prototype": Term(ce, self.settings.alpha * slower.to(ce.dtype))}

    def similarities(self, out: Outputs) -> list[torch.Tensor]:
        """-||h_k - c_k||_2, M times [B, C]; a class without a prototype is far."""
        return [
            torch.where(self.seen, similarity(full_precision(h), self.get_buffer(f"prototypes_{name}")), FAR)
            for name, h in out.features.items()
        ]

    def paces(self, similar: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """s_k of the global batch, [M]."""
        group = self.context.group
        return group.sum_(amd.scores(similar, batch.labels, score="true_class")) / (len(batch) * group.world)

    @torch.no_grad()
    def figures(
        self, batch: Batch, out: Outputs, loss: torch.Tensor, terms: Mapping[str, Term], **more: torch.Tensor
    ) -> Figures:
        """Those of every method and `pace`, s_k [M]."""
        return super().figures(batch, out, loss, terms, **more, pace=self.paces(self.similarities(out), batch))


def similarity(h: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """-||h - c||_2 of every clip and class: [B, D], [C, D] -> [B, C]."""
    squared = (h[:, None] - prototypes[None]).square().sum(dim=2)
    # The root's own gradient at 0 is infinite.
    return -torch.where(squared > 0, torch.where(squared > 0, squared, 1.0).sqrt(), 0.0)


def is_slower(s: torch.Tensor) -> torch.Tensor:
    """Whether a modality's s_k is below the largest, [M] -> [M]."""
    return s < s.max()
