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
from mbcd_cli.methods.parts import DomainAdversary, FusedDomainAdversary, cross_entropy, modulation
from mbcd_cli.settings import Count, MethodSettings, NonNegative, Range

FLOOR = 1e-6
"""Added to what probabilities are divided by."""
_FUSED, _UNIMODAL = ("of", "fused"), ("of", "unimodal")


class GMPSettings(MethodSettings):
    """GMP."""

    of: Literal["fused", "unimodal"] = "fused"
    """Losses whose gradients are modulated: the fused ones, or uni-modal ones that come on top (public benchmark)."""
    unimodal_weight: Annotated[NonNegative, Range(0, 5, benchmark=1, only=_UNIMODAL)] = 1.0
    """Weight of the uni-modal cross-entropies."""
    domain_weight: Annotated[NonNegative, Range(0, 1, only=_FUSED)] = 0.5
    """Weight of the domain loss in the encoders' gradients (the paper's lambda, times `reversal`)."""
    reversal: Annotated[NonNegative, Range(0, 1, benchmark=1)] = 0.3
    """b, what the domain gradient is multiplied with (and reversed) on its way into the encoders."""
    alpha_class: Annotated[NonNegative, Range(0, 1, benchmark=1)] = 0.5
    """Strength of the modulation of the classification gradients."""
    alpha_domain: Annotated[NonNegative, Range(0, 1, benchmark=1)] = 0.5
    """Strength of the modulation of the domain gradients."""
    norm_with_head: bool = False
    """Of uni-modal losses: the norm of a gradient includes its head's part (public benchmark; not in the paper)."""
    adversary: Literal["trained", "frozen"] = "trained"
    """The adversary trains on its own domain losses, or stays as it was drawn (the public benchmark)."""
    hidden: Count = 512
    """Width of the adversary."""


class GMP(Method):
    """g_c + g_d per modality: each modulated, the one that dominates less projected off the other at a conflict.

    g_c is the gradient of CE(fused) (and of the uni-modal losses, unless those heads probe), g_d that of the
    reversed loss of a discriminator of source domains on the fused features. q_k and c_k are the mean probabilities
    of the true class and domain that modality k's own features tell (`told_alone`, and a discriminator that
    probes); rho_k = q_k / mean_{j != k} q_j, sigma_k = mean_{j != k} c_j / c_k; g_c is multiplied with 1 -
    tanh(alpha rho_k) where rho_k > 1, g_d likewise (Eq. 8-10). Where g_c . g_d < 0, g_c loses its part along g_d if
    rho_k > sigma_k, else g_d its part along g_c (Eq. 12-15).

    of = "unimodal": g_c is the gradient of weight * CE_k, g_d that of the reversed domain loss of modality k alone,
    and the encoder takes grad CE(fused) + g_c + g_d; g_c gives way where rho_k = sigma_k, too. S = 1: there is no
    adversary; M = 1: both ratios are 1.
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
        dims, domains = context.model.dims, len(context.sources)
        same = {"domains": domains, "hidden": settings.hidden, "strength": settings.reversal}
        self.adversary = DomainAdversary(dims, **same) if domains > 1 else None
        self.fused_adversary = FusedDomainAdversary(dims, **same) if domains > 1 and settings.of == "fused" else None
        self.requires_grad_(settings.adversary == "trained")

    def gradients(self, batch: Batch) -> Figures:
        """Backward passes for the domain losses, for the uni-modal ones that are modulated, and for all the others."""
        settings, context, model = self.settings, self.context, self.context.model
        batch = self.at_cut(batch)
        out = self(batch)
        terms = self.losses(batch, out)
        weights, theta = model.theta(), gcc.in_order(model.theta())
        heads = {name: list(model.heads[name].parameters()) for name in model.modalities}
        together = settings.of == "fused"
        alone = self.told_alone(out.features, out.unimodal) if together else list(out.unimodal.values())
        rho = dominance(self.true_probabilities(alone, batch.labels))
        g_d, sigma = [torch.zeros_like(parameter) for parameter in theta], torch.ones_like(rho)
        if self.adversary is not None:
            g_d, sigma = self.domain_gradients(batch, out, terms, theta)
        if together:
            heads = {name: [] for name in heads}
            context.backward(terms["ce_fused"].value + settings.unimodal_weight * terms["ce"].value.sum())
            g_c = [context.gradient(parameter) for parameter in theta]
            fused = [torch.zeros_like(gradient) for gradient in g_c]
        else:
            loss = settings.unimodal_weight * terms["ce"].value.sum()
            g_c = context.gradients(loss, [*theta, *(p for each in heads.values() for p in each)], retain_graph=True)
            context.backward(terms["ce_fused"].value)
            fused = [context.gradient(parameter) for parameter in theta]
        context.group.average_([*g_c, *g_d])
        kappa, p = modulation(rho, settings.alpha_class), modulation(sigma, settings.alpha_domain)
        class_tail, class_head, domain = iter(g_c[: len(theta)]), iter(g_c[len(theta) :]), iter(g_d)
        rest, class_gives_way = iter(fused), rho > sigma if together else rho >= sigma
        for k, name in enumerate(model.modalities):
            tail = list(weights[name].values())
            c = [kappa[k] * next(class_tail) for _ in tail]
            head = [kappa[k] * next(class_head) for _ in heads[name]]
            d = [p[k] * next(domain) for _ in tail]
            more = head if settings.norm_with_head else []
            for parameter, change in zip(tail, combined(c, d, more, class_gives_way[k]), strict=True):
                context.set_gradient(parameter, next(rest) + change)
            for parameter, gradient in zip(heads[name], head, strict=True):
                context.set_gradient(parameter, gradient)
        return self.figures(batch, out, total(terms), terms, rho=rho, sigma=sigma, kappa=kappa, p=p)

    def domain_gradients(
        self, batch: Batch, out: Outputs, terms: dict[str, Term], theta: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """g_d of the encoders' parameters, and sigma [M]; adds to `terms`, and leaves the adversary its gradient."""
        settings, context = self.settings, self.context
        domains, fused = context.source_domains(batch), None
        own = list(self.parameters()) if settings.adversary == "trained" else []
        with context.autocast():
            if self.fused_adversary is not None:
                fused = cross_entropy(self.fused_adversary(out.features), domains)
            seen = out.features if fused is None else {name: h.detach() for name, h in out.features.items()}
            judged = self.adversary(seen)
        each = torch.stack([cross_entropy(logits, domains) for logits in judged])
        if fused is not None:
            terms["domain_fused"] = Term(fused, settings.domain_weight)
        terms["domain"] = Term(each, settings.domain_weight if fused is None else 1.0)
        loss = each.sum() if fused is None else fused + each.sum()
        gradients = context.gradients(loss, [*theta, *own], retain_graph=True)
        for parameter, gradient in zip(own, gradients[len(theta) :], strict=True):
            context.set_gradient(parameter, gradient / (len(each) if fused is None else 1))
        g_d = [settings.domain_weight * gradient for gradient in gradients[: len(theta)]]
        return g_d, confusion(self.true_probabilities(judged, domains))

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
