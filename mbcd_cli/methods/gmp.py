"""GMP: gradient modulation projection (Li et al., AAAI 2026, arXiv 2603.14175), with an adversary that trains.

Letters: B clips, M modalities, S source domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.methods import gradient_consistency as gcc
from mbcd_cli.methods import modality_dropout as amd
from mbcd_cli.methods.base import Context, Figures, Method, Outputs, Term, total
from mbcd_cli.methods.parts import DomainAdversary, cross_entropy, modulation
from mbcd_cli.settings import Count, MethodSettings, NonNegative, Range

FLOOR = 1e-6
"""Added to what probabilities are divided by."""


class GMPSettings(MethodSettings):
    """GMP."""

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders, or only probe detached features, to be reported."""
    unimodal_weight: Annotated[NonNegative, Range(0, 5, benchmark=1)] = 3.0
    """Weight of the uni-modal cross-entropies."""
    domain_weight: NonNegative = 0.5
    """Weight of the domain losses in the encoders' gradients."""
    reversal: Annotated[NonNegative, Range(0, 1, benchmark=1)] = 0.3
    """b, what the domain gradient is multiplied with (and reversed) on its way into the encoders."""
    alpha_class: Annotated[NonNegative, Range(0, 1, benchmark=1)] = 0.5
    """Strength of the modulation of the classification gradients."""
    alpha_domain: Annotated[NonNegative, Range(0, 1, benchmark=1)] = 0.5
    """Strength of the modulation of the domain gradients."""
    norm_with_head: bool = False
    """The norm of a classification gradient includes its head's part, as in the public benchmark; not in the paper."""
    adversary: Literal["trained", "frozen"] = "trained"
    """The adversary trains on the mean of its domain losses, or stays as it was drawn (the public benchmark)."""
    hidden: Count = 512
    """Width of the adversary."""


class GMP(Method):
    """grad CE(fused), and per modality g_c + g_d: each modulated, the one that dominates less projected at a conflict.

    g_c is the gradient of the uni-modal cross-entropy, g_d that of the reversed domain loss. q_k and c_k are the mean
    probabilities of the true class and domain, rho_k = q_k / mean_{j != k} q_j, sigma_k = mean_{j != k} c_j / c_k; g_c
    is multiplied with 1 - tanh(alpha rho_k) where rho_k > 1, g_d likewise (Eq. 8-10). Where g_c . g_d < 0, g_c loses
    its part along g_d if rho_k >= sigma_k, else g_d its part along g_c (Eq. 12-15). The adversary trains on the mean of
    its domain losses. S = 1: there is no adversary; M = 1: both ratios are 1.
    """

    Settings = GMPSettings
    settings: GMPSettings
    ticker = ("ce_fused", "rho", "sigma")
    neutral: ClassVar[Mapping[str, object]] = {
        "unimodal": "probe",
        "unimodal_weight": 1.0,
        "domain_weight": 0.0,
        "alpha_class": 0.0,
    }

    def __init__(self, settings: GMPSettings, context: Context) -> None:
        super().__init__(settings, context)
        model, domains = context.model, len(context.sources)
        self.adversary = None
        if domains > 1:
            self.adversary = DomainAdversary(
                model.dims, domains=domains, hidden=settings.hidden, strength=settings.reversal
            ).requires_grad_(settings.adversary == "trained")

    def gradients(self, batch: Batch) -> Figures:
        """Three backward passes: the classification and the domain losses of all modalities, and the fused loss."""
        settings, context, model = self.settings, self.context, self.context.model
        batch = self.at_cut(batch)
        out = self(batch)
        terms = self.losses(batch, out)
        weights, heads = model.theta(), {name: list(model.heads[name].parameters()) for name in model.modalities}
        theta, classifiers = gcc.in_order(weights), [p for of_head in heads.values() for p in of_head]
        alone = settings.unimodal_weight * terms["ce"].value.sum()
        g_c = context.gradients(alone, [*theta, *classifiers], retain_graph=True)
        rho = dominance(self.true_probabilities(list(out.unimodal.values()), batch.labels))
        g_d, sigma = [torch.zeros_like(p) for p in theta], torch.ones_like(rho)
        own = list(self.parameters()) if settings.adversary == "trained" else []
        g_own: list[torch.Tensor] = []
        if self.adversary is not None:
            domains = self.context.source_domains(batch)
            with self.context.autocast():
                judged = self.adversary(out.features)
            loss = torch.stack([cross_entropy(logits, domains) for logits in judged])
            terms["domain"] = Term(loss, settings.domain_weight)
            gradients = context.gradients(loss.sum(), [*theta, *own], retain_graph=True)
            g_d, g_own = [settings.domain_weight * g for g in gradients[: len(theta)]], gradients[len(theta) :]
            sigma = confusion(self.true_probabilities(judged, domains))
        context.backward(terms["ce_fused"].value)
        context.group.average_([*g_c, *g_d])
        kappa, p = modulation(rho, settings.alpha_class), modulation(sigma, settings.alpha_domain)
        for parameter, gradient in zip(own, g_own, strict=True):
            context.set_gradient(parameter, gradient / len(rho))
        class_tail, class_head, domain = iter(g_c[: len(theta)]), iter(g_c[len(theta) :]), iter(g_d)
        for k, name in enumerate(model.modalities):
            tail = list(weights[name].values())
            c = [kappa[k] * next(class_tail) for _ in tail]
            head = [kappa[k] * next(class_head) for _ in heads[name]]
            d = [p[k] * next(domain) for _ in tail]
            more = head if settings.norm_with_head else []
            for parameter, change in zip(tail, combined(c, d, more, rho[k] >= sigma[k]), strict=True):
                context.set_gradient(parameter, context.gradient(parameter) + change)
            for parameter, gradient in zip(heads[name], head, strict=True):
                context.set_gradient(parameter, gradient)
        return self.figures(batch, out, total(terms), terms, rho=rho, sigma=sigma, kappa=kappa, p=p)

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, the uni-modal ones weighted."""
        terms = super().losses(batch, out)
        return terms | {"ce": Term(terms["ce"].value, self.settings.unimodal_weight)}

    def true_probabilities(self, logits: Sequence[torch.Tensor], truth: torch.Tensor) -> torch.Tensor:
        """Mean probability of the truth in the global batch, [M]."""
        group = self.context.group
        return group.sum_(amd.scores(logits, truth, score="true_class")) / (len(truth) * group.world)


def dominance(q: torch.Tensor) -> torch.Tensor:
    """rho_k = q_k / (mean_{j != k} q_j + 1e-6), [M]; ones for a single modality."""
    return q / (_others(q) + FLOOR) if len(q) > 1 else torch.ones_like(q)


def confusion(c: torch.Tensor) -> torch.Tensor:
    """sigma_k = mean_{j != k} c_j / (c_k + 1e-6), [M]; ones for a single modality."""
    return _others(c) / (c + FLOOR) if len(c) > 1 else torch.ones_like(c)


def _others(x: torch.Tensor) -> torch.Tensor:
    return (x.sum() - x) / (len(x) - 1)


def combined(
    c: Sequence[torch.Tensor], d: Sequence[torch.Tensor], head: Sequence[torch.Tensor], project_class: torch.Tensor
) -> list[torch.Tensor]:
    """g_c + g_d of one encoder, at a conflict one without its part along the other (Eq. 12-15), without a branch.

    Args:
        c, d: both gradients by parameter. head: what counts for the norm of g_c besides.
        project_class: whether g_c gives way, [].
    """
    dot = sum((x * y).sum() for x, y in zip(c, d, strict=True))
    along_d = dot / (sum(x.square().sum() for x in d) + 1e-12)
    along_c = dot / (sum(x.square().sum() for x in [*c, *head]) + 1e-12)
    from_c = torch.where((dot < 0) & project_class, along_d, 0.0)
    from_d = torch.where((dot < 0) & ~project_class, along_c, 0.0)
    return [(x - from_c * y) + (y - from_d * x) for x, y in zip(c, d, strict=True)]
