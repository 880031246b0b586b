"""How far each modality can be relied on, for a dropout and a distillation that force no broken branch (ours).

Letters: B clips (of this process), M modalities, C classes, S source domains, D_k features of modality k.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Annotated, Literal

import torch
from torch import nn
from torch.nn import functional as F

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.arl import TEMPERATURE, pushes, reliance
from mbcd_cli.methods.base import Context, EpochClips, Term
from mbcd_cli.methods.parts import full_precision, logits_of_some, mean_entropies
from mbcd_cli.settings import NonNegative, Range, Slice

LEAST_NLL = 1e-3
"""Least loss that is told from none: q_k is 1000 at most."""


class ReliabilitySettings(Slice):
    """Modalities that are less reliable than others are not forced (ours)."""

    by: Literal["none", "validation", "left_out", "arl"] = "none"
    """What q_k is: from heads' loss on the sources' test split, that of probes on a source they lack, or ARL's c_k."""
    power: Annotated[NonNegative, Range(0.25, 4, times=True, only=("by", "validation", "left_out", "arl"))] = 1.0
    """Power of the ratios of q_k."""


class Reliability(nn.Module):
    """q_k, [M]; what is kept of it between epochs, and the probes that leave a source out.

    A probe is a linear head on detached features that trains on the clips of all sources but one: S of them for every
    modality, as one layer.
    """

    def __init__(self, settings: ReliabilitySettings, context: Context) -> None:
        super().__init__()
        self._context, self._by = context, settings.by
        self.power = settings.power
        self.domains = len(context.sources)
        self.probes = None
        if settings.by in ("validation", "left_out"):
            self.register_buffer("nll", torch.ones(len(context.model.modalities)))
        if settings.by == "left_out" and self.domains > 1:
            # Zeros, for a convex problem, are no draw of the training's.
            outside = self.domains * context.model.classes
            self.probes = nn.ModuleDict({n: _zeros(d, outside) for n, d in context.model.dims.items()})

    def loss(self, features: Mapping[str, torch.Tensor], batch: Batch) -> dict[str, Term]:
        """The probes' term `left_out` [M], of features [B, D_k]; nothing where there are none."""
        if self.probes is None:
            return {}
        with self._context.autocast():
            logits = {n: probe(features[n].detach()) for n, probe in self.probes.items()}
        seen = 1 - self._own_source(batch)
        of_modality = [(seen * self._nll(rows, batch.labels)).sum() / len(batch) for rows in logits.values()]
        return {"left_out": Term(torch.stack(of_modality), 1 / (self.domains - 1))}

    @torch.no_grad()
    def q(self, features: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """q_k, [M], in this step, from the student's features [B, D_k]."""
        if self._by != "arl":
            return 1 / self.nll.clamp(min=LEAST_NLL)
        context = self._context
        with context.autocast():
            alone = logits_of_some(context.model, features, [{k} for k in range(len(features))])
        sizes = torch.stack([full_precision(logits).abs().sum(dim=1).mean() for logits in alone])
        sizes, entropies = context.group.average([sizes, torch.stack(mean_entropies(alone))])
        return pushes(sizes / sizes.sum(), reliance(entropies), temperature=TEMPERATURE)

    @torch.no_grad()
    def measure(self, clips: EpochClips) -> None:
        """Losses on the sources' test split, in eval mode: means over the clips of a source, then over sources."""
        if self._by == "arl":
            return
        model = self._context.model.eval()
        sums = torch.zeros(len(self.nll), self.domains, dtype=torch.float64)
        counts = torch.zeros(self.domains, dtype=torch.float64)
        with closing(clips.validation()) as batches:
            for batch in batches:
                with self._context.autocast():
                    features = model.features(model.at_cut(batch.inputs))
                    if self.probes is None:
                        logits = model.unimodal(features)
                    else:
                        logits = {n: probe(features[n]) for n, probe in self.probes.items()}
                own = self._own_source(batch)
                for k, rows in enumerate(logits.values()):
                    if self.probes is None:
                        nll = F.cross_entropy(full_precision(rows), batch.labels, reduction="none")[:, None]
                    else:
                        nll = self._nll(rows, batch.labels)
                    sums[k] += (own * nll).sum(dim=0).cpu().double()
                counts += own.sum(dim=0).cpu().double()
        here = counts > 0
        if bool(here.any()):
            self.nll.copy_((sums[:, here] / counts[here]).mean(dim=1))

    def _own_source(self, batch: Batch) -> torch.Tensor:
        """Whether a clip is of source s, [B, S] of 0 and 1."""
        return (batch.domains[:, None] == self._context.sources[None, :]).to(next(self._context.model.parameters()))

    def _nll(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of every clip by the probe that leaves out source s: [B, S C] -> [B, S]."""
        logs = full_precision(logits).unflatten(1, (self.domains, -1)).log_softmax(dim=2)
        return -logs.gather(2, labels[:, None, None].expand(-1, self.domains, 1))[:, :, 0]


def _zeros(inside: int, outside: int) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inside, outside)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def of_the_others(q: torch.Tensor) -> torch.Tensor:
    """max_{j != k} q_j / q_k: what is left without modality k can be relied on as its best one can; [M] -> [M]."""
    if len(q) == 1:
        return torch.ones_like(q)
    itself = torch.eye(len(q), dtype=torch.bool, device=q.device)
    return q[None, :].expand(len(q), -1).masked_fill(itself, 0).amax(dim=1) / q
