"""How far each modality can be relied on, for a dropout and a distillation that force no broken branch (ours).

Letters: B clips (of this process), M modalities, C classes, S source domains, D_k features of modality k.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Annotated, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.arl import TEMPERATURE, pushes, reliance
from mbcd_cli.methods.base import Context, EpochClips
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
    """q_k, [M], and what is kept of it between epochs."""

    def __init__(self, settings: ReliabilitySettings, context: Context) -> None:
        super().__init__()
        self._context, self._by = context, settings.by
        self.power = settings.power
        if settings.by in ("validation", "left_out"):
            self.register_buffer("nll", torch.ones(len(context.model.modalities)))

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
        model, read, labels, domains = self._context.model.eval(), [], [], []
        with closing(clips.validation()) as batches:
            for batch in batches:
                with self._context.autocast():
                    features = model.features(model.at_cut(batch.inputs))
                    heads = model.unimodal(features)
                read.append([(features[n].cpu().double(), heads[n].cpu().double()) for n in features])
                labels.append(batch.labels.cpu())
                domains.append(batch.domains.cpu())
        if not read:
            return
        y, domain = torch.cat(labels), torch.cat(domains)
        sources, losses = domain.unique(), []
        for batches_of_one in zip(*read, strict=True):
            rows, logits = (torch.cat(parts) for parts in zip(*batches_of_one, strict=True))
            of_source = []
            for own in (domain == source for source in sources):
                told = logits[own]
                if self._by == "left_out" and len(sources) > 1:
                    classes = self._context.model.classes
                    told = logits_by_regression(rows[~own], y[~own], rows[own], classes=classes)
                of_source.append(F.cross_entropy(told, y[own]))
            losses.append(torch.stack(of_source).mean())
        self.nll.copy_(torch.stack(losses))


def logits_by_regression(
    rows: torch.Tensor, labels: torch.Tensor, others: torch.Tensor, *, classes: int
) -> torch.Tensor:
    """Logits [N', C] of other rows [N', D] by the linear head that fits these rows [N, D] with labels [N], in float64.

    The head is at the least of sum_i CE_i + |W|^2 / 2, W [C, D + 1] its weights and biases and rows divided by their
    spread: a strictly convex problem, so that neither first weights nor steps matter, and a class without a clip
    gets a finite logit.
    """
    # A third of a second to import; torch's own loads its compiler at its first step.
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    x, y = rows.numpy(), labels.numpy()
    mean, spread = x.mean(axis=0), x.std(axis=0)

    def scaled(values: np.ndarray) -> np.ndarray:
        return np.pad((values - mean) / np.where(spread > 0, spread, 1), ((0, 0), (0, 1)), constant_values=1)

    x, each = scaled(x), np.arange(len(y))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(classes, -1)
        logs = log_softmax(x @ weights.T, axis=1)
        wrong = np.exp(logs)
        wrong[each, y] -= 1
        return flat @ flat / 2 - logs[each, y].sum(), (wrong.T @ x + weights).ravel()

    options = {"maxiter": 500, "ftol": 1e-15, "gtol": 1e-8}
    found = minimize(loss, np.zeros(classes * x.shape[1]), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(scaled(others.numpy()) @ found.x.reshape(classes, -1).T)


def of_the_others(q: torch.Tensor) -> torch.Tensor:
    """max_{j != k} q_j / q_k: what is left without modality k can be relied on as its best one can; [M] -> [M]."""
    if len(q) == 1:
        return torch.ones_like(q)
    itself = torch.eye(len(q), dtype=torch.bool, device=q.device)
    return q[None, :].expand(len(q), -1).masked_fill(itself, 0).amax(dim=1) / q
