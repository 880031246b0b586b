"""ADMMDG: two contrasts with adversarial pair weights, and projected gradients (the authors' code; paper not read).

Letters: B clips of the global batch, M modalities, S source domains, D_k features of modality k, n = M B rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.layers import product
from mbcd_cli.methods import gradient_consistency as gcc
from mbcd_cli.methods.base import Context, Figures, Outputs, Term, total
from mbcd_cli.methods.dropping import DroppingMethod, DroppingSettings
from mbcd_cli.methods.parts import (
    BASE_TEMPERATURE,
    halves,
    halves_apart,
    reversed_gradient,
    shared_projections,
    unit_rows,
)
from mbcd_cli.settings import AROUND, Count, NonNegative, Positive

FLOOR = 1e-12
"""Least squared norm that is divided by."""


class ADMMDGSettings(DroppingSettings):
    """ADMMDG."""

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders, or only probe detached features, to be reported."""
    across: Annotated[NonNegative, AROUND] = 0.1
    """Weight of the contrast of the shared halves, across modalities and domains."""
    within: Annotated[NonNegative, AROUND] = 0.1
    """Weight of the contrast of the specific halves, whose positives are of one modality."""
    separation: Annotated[NonNegative, AROUND] = 0.1
    """Weight of the distance between the halves."""
    surgery: Literal["projected", "sum"] = "projected"
    """Gradients of the four objectives lose their parts along those that they conflict with, or are summed."""
    temperature: Positive = 0.1
    """Temperature of both contrasts."""
    hidden: Count = 2048
    """Width of the projections."""


class ADMMDG(DroppingMethod):
    """Objectives CE(fused) + sum_k CE_k, 0.1 wsup across, 0.1 wsup within and -0.1 mean_k MSE(halves), by PCGrad.

    wsup(z) = -(tau / 0.07) mean over anchors a that have positives of sum_b w_ab [ s_ab - log sum_{c != a} exp s_ac ],
    s = z z^T / tau, w_a = softmax over a's positives b of the logit of (group of a, group of b). Across: z = hat(P_k)
    of the shared halves, positives of the same label, groups (modality, domain). Within: of the specific halves,
    positives of the same label and modality, groups (domain). The logits begin at 0, are made symmetric, and ascend.
    Each objective's gradient, over all that trains, loses its part along every objective's with which it then
    conflicts, in random order; encoders take the mean of the four, all else the sum.
    """

    Settings = ADMMDGSettings
    settings: ADMMDGSettings
    average = "ema"
    ticker = ("ce_fused", "across", "within")
    neutral: ClassVar[Mapping[str, object]] = {
        "unimodal": "probe",
        "across": 0.0,
        "within": 0.0,
        "separation": 0.0,
        "surgery": "sum",
        "dropout": 0.0,
        "feature_noise": {"enabled": False},
    }

    def __init__(self, settings: ADMMDGSettings, context: Context) -> None:
        super().__init__(settings, context)
        dims, domains = context.model.dims, len(context.sources)
        self.shared = shared_projections(dims, hidden=settings.hidden, method="admmdg")
        self.specific = shared_projections(dims, hidden=settings.hidden, method="admmdg")
        # A single logit is one that no softmax sees.
        self._trains_across, self._trains_within = len(dims) * domains > 1, domains > 1
        across, within = torch.zeros(len(dims), domains, len(dims), domains), torch.zeros(len(dims), domains, domains)
        self.pairs_across = nn.Parameter(across, requires_grad=self._trains_across)
        self.pairs_within = nn.Parameter(within, requires_grad=self._trains_within)

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, `across`, `within` and `separation`."""
        group, settings = self.context.group, self.settings
        halved = dict(zip(out.features, halves(out.features), strict=True))
        with self.context.autocast():
            shared = [self.shared[name](half) for name, (half, _) in halved.items()]
            specific = [self.specific[name](half) for name, (_, half) in halved.items()]
        across, within = (torch.cat([group.gather(unit_rows(z)) for z in rows]) for rows in (shared, specific))
        labels, domains = group.gather(batch.labels), group.gather(self.context.source_domains(batch))
        pairs, temperature = Pairs.of(labels, domains, modalities=len(halved)), settings.temperature
        of_all = weighted_contrast(across, pairs.label, pairs.across(self.pairs_across), temperature=temperature)
        of_one = weighted_contrast(
            within, pairs.label & pairs.modality, pairs.within(self.pairs_within), temperature=temperature
        )
        return super().losses(batch, out) | {
            "across": Term(of_all, settings.across),
            "within": Term(of_one, settings.within),
            "separation": Term(halves_apart(out.features), settings.separation),
        }

    def gradients(self, batch: Batch) -> Figures:
        """A backward pass for each of the four objectives."""
        context, model = self.context, self.context.model
        batch = self.at_cut(batch)
        out = self(batch)
        terms = self.losses(batch, out)
        loss = total(terms)
        if self.settings.surgery == "sum":
            context.backward(loss)
            return self.figures(batch, out, loss, terms)
        objectives = [("ce_fused", "ce"), ("across",), ("within",), ("separation",)]
        theta = gcc.in_order(model.theta())
        own: list[list[torch.Tensor]] = [
            [*model.heads.parameters(), *model.fused_head.parameters()],
            [*self.shared.parameters(), *([self.pairs_across] if self._trains_across else [])],
            [*self.specific.parameters(), *([self.pairs_within] if self._trains_within else [])],
            [],
        ]
        gradients = [
            context.gradients(total({name: terms[name] for name in names}), [*theta, *its], retain_graph=True)
            for names, its in zip(objectives, own, strict=True)
        ]
        context.group.average_([gradient for of_one in gradients for gradient in of_one])
        gram = gram_matrix(gradients, shared=len(theta))
        # What the projected gradients are made of, and their mean.
        shares = projected(gram, context.randomness.uniform(len(own), len(own)).argsort(dim=1)).mean(dim=0)
        for number, parameter in enumerate(theta):
            each = [share * of_one[number] for share, of_one in zip(shares, gradients, strict=True)]
            context.set_gradient(parameter, torch.stack(each).sum(dim=0))
        for share, its, of_one in zip(shares, own, gradients, strict=True):
            for parameter, gradient in zip(its, of_one[len(theta) :], strict=True):
                context.set_gradient(parameter, len(own) * share * gradient)
        return self.figures(batch, out, loss.detach(), terms, conflicts=(gram < 0).sum() / 2)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Of n rows, the clips of one modality after those of another.

    Attributes:
        label, modality: which two rows are of one label (and not one row), of one modality; [n, n].
        modalities, domains: of each row, [n].
    """

    label: torch.Tensor
    modality: torch.Tensor
    modalities: torch.Tensor
    domains: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor, domains: torch.Tensor, *, modalities: int) -> Pairs:
        """Those of `modalities` times clips with labels [B] and domains [B]."""
        of_modality = torch.arange(modalities, device=labels.device).repeat_interleave(len(labels))
        labels, domains = labels.repeat(modalities), domains.repeat(modalities)
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        label = (labels[:, None] == labels[None, :]) & ~itself
        return cls(label, of_modality[:, None] == of_modality[None, :], of_modality, domains)

    def across(self, logits: torch.Tensor) -> torch.Tensor:
        """That of each pair, [n, n], of [M, S, M, S]; their gradient reversed."""
        modalities, sources = logits.shape[:2]
        table, group = logits.reshape(modalities * sources, -1), self.modalities * sources + self.domains
        table = reversed_gradient((table + table.mT) / 2, 1.0)
        return table[group][:, group]

    def within(self, logits: torch.Tensor) -> torch.Tensor:
        """That of each pair of rows of one modality, [n, n], of [M, S, S]; their gradient reversed."""
        table = reversed_gradient((logits + logits.mT) / 2, 1.0)
        return table[self.modalities, self.domains][:, self.domains]


def weighted_contrast(
    z: torch.Tensor, positive: torch.Tensor, logits: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """wsup, [], of unit rows [n, D], positives [n, n] and logits of the pairs [n, n]; 0 where no anchor has any."""
    similarity = product(z, z.mT) / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    # A large negative number rather than -inf: a row may have no positive, or no contrast.
    log_probability = similarity - similarity.masked_fill(itself, -1e9).logsumexp(dim=1, keepdim=True)
    weights = logits.masked_fill(~positive, -1e9).softmax(dim=1) * positive
    anchors = positive.any(dim=1).sum().clamp(min=1)
    return -((weights * log_probability).sum() * temperature) / BASE_TEMPERATURE / anchors


def gram_matrix(gradients: Sequence[Sequence[torch.Tensor]], *, shared: int) -> torch.Tensor:
    """Products of the objectives' gradients, [T, T]; the first `shared` tensors of each are of the same parameters.

    All others are of parameters that one objective reaches alone.
    """
    zero = torch.zeros_like(gradients[0][-1].flatten()[0])
    alone = [sum(((g * g).sum() for g in of_one[shared:]), start=zero) for of_one in gradients]
    gram = torch.diag_embed(torch.stack(alone))
    for each in zip(*(of_one[:shared] for of_one in gradients), strict=True):
        rows = torch.stack([gradient.flatten() for gradient in each])
        gram = gram + product(rows, rows.mT)
    return gram


def projected(gram: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """PCGrad (Yu et al., 2020): which sums of the first ones the projected gradients are, [T, T], rows of factors.

    g_i loses, for every j in its order, i among them, g_j <g_i, g_j> / ||g_j||^2 where that product is negative. Every
    g_i stays a sum of the first gradients, so that their products tell those of all.

    Args:
        gram: products of the first ones, [T, T].
        order: of each i, the numbers 0 to T - 1, [T, T].
    """
    numbers = torch.arange(len(gram), device=gram.device)
    shares = (numbers[:, None] == numbers[None, :]).to(gram.dtype)
    for turn in order.unbind(dim=1):
        along = (turn[:, None] == numbers[None, :]).to(gram.dtype)
        dot = (product(shares, gram) * along).sum(dim=1)
        length = (gram.diagonal() * along).sum(dim=1)
        shares = shares - (torch.where(dot < 0, dot, 0.0) / length.clamp(min=FLOOR))[:, None] * along
    return shares
