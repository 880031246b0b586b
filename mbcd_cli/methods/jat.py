"""JAT: joint adversarial training (Li et al., ACM MM 2025), called MDJA in its code.

Letters: B clips (of this process), M modalities, C classes, S source domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, Figures, Outputs, Panel, Shown, Term
from mbcd_cli.methods.dropping import DroppingMethod, DroppingSettings
from mbcd_cli.methods.parts import (
    Adversary,
    DomainAdversary,
    FusedDomainAdversary,
    cross_entropy,
    mean_entropies,
)
from mbcd_cli.settings import Count, NonNegative, Positive, Range


class JATSettings(DroppingSettings):
    """JAT, as its published code trains; the public benchmark's recipe is the variant `jat-benchmark`."""

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders (the paper), or only probe detached features."""
    unimodal_weight: Annotated[NonNegative, Range(0, 5, benchmark=1)] = 1.0
    """Weight of the uni-modal cross-entropies, on top of w_k."""
    weighting: Literal["domain", "off"] = "domain"
    """w_k: by the confusion of each modality's domain discriminator (the paper), or all alike."""
    weights_sum: Literal["modalities", "one"] = "modalities"
    """What the weights w_k sum to: the number of modalities (the published code), or one (the public benchmark)."""
    single_source: Literal["uniform", "class"] = "uniform"
    """w_k with one source domain: all alike (the published code), or by class entropies (the public benchmark)."""
    temperature: Positive = 1.0
    """Temperature of the softmax that gives w_k."""
    modality_weight: Annotated[NonNegative, Range(0, 1, benchmark=1)] = 0.1
    """Weight of the modality adversary."""
    domain_weight: Annotated[NonNegative, Range(0, 1, benchmark=1)] = 0.5
    """Weight of each of the two domain adversaries."""
    modality_reversal: Annotated[NonNegative, Range(0, 1, benchmark=1)] = 0.1
    """a, what the modality adversary's gradient is multiplied with (and reversed) on its way into the encoders."""
    domain_reversal: Annotated[NonNegative, Range(0, 1, benchmark=1)] = 0.3
    """b, the same of the domain adversaries."""
    hidden: Count = 512
    """Width of the modality adversary and of the domain adversary on each modality."""
    fused_hidden: Count = 2048
    """Width of the domain adversary on the fused features; 512 in the public benchmark."""


class JAT(DroppingMethod):
    """CE(fused) + c_u sum_k w_k CE_k + c_m mean_k CE(J(Q_k(R_a(h_k))), k) + c_d (local + global), in one pass.

    local = mean_k CE(D(Q'_k(R_b(h_k))), d) and global = CE(G(R_b(h_1 (+) ... (+) h_M)), d) tell the source domain d
    from single and from concatenated features; J tells the modality. R reverses gradients. w = M softmax_k(E H(p_k)),
    p_k the domain posterior of D for modality k: the modality whose domain is harder to tell counts more. Nothing is
    detached. The fused head sees features of which every clip loses each modality with some probability, never all;
    heads and adversaries see them whole. S = 1: no domain adversaries; M = 1: the modality adversary is 0.
    """

    Settings = JATSettings
    settings: JATSettings
    average = "ema"
    ticker = ("ce_fused", "domain", "w")
    neutral: ClassVar[Mapping[str, object]] = {
        "unimodal": "probe",
        "unimodal_weight": 1.0,
        "weighting": "off",
        "weights_sum": "modalities",
        "modality_weight": 0.0,
        "domain_weight": 0.0,
        "dropout": 0.0,
        "feature_noise": {"enabled": False},
    }

    def __init__(self, settings: JATSettings, context: Context) -> None:
        super().__init__(settings, context)
        dims, domains = context.model.dims, len(context.sources)
        self.modality_adversary = Adversary(
            dims,
            nn.Linear(settings.hidden, len(dims)),
            hidden=settings.hidden,
            strength=settings.modality_reversal,
        )
        self.domain_adversary = self.fused_adversary = None
        if domains > 1:
            strength = settings.domain_reversal
            self.domain_adversary = DomainAdversary(dims, domains=domains, hidden=settings.hidden, strength=strength)
            self.fused_adversary = FusedDomainAdversary(
                dims, domains=domains, hidden=settings.fused_hidden, strength=strength
            )

    @classmethod
    def panels(cls, settings: JATSettings) -> tuple[Panel, ...]:
        """The weights of the modalities, where they differ."""
        if settings.weighting == "off":
            return ()
        shown = {"w": Shown("$w_k$", axis="$w_k$", row="w_k")}
        note = (
            "What the uni-modal losses are multiplied with: more, the less a modality tells the source domains apart."
        )
        return (Panel("weights", "weight w_k of the uni-modal losses over training", shown, note),)

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, the uni-modal ones weighted, `modality`, and of several sources `domain` and `domain_fused`."""
        settings, terms = self.settings, super().losses(batch, out)
        confused: list[torch.Tensor] | None = None
        count = len(out.features)
        with self.context.autocast():
            told = self.modality_adversary(out.features)
        named = torch.arange(count, device=out.fused.device)
        modality = [cross_entropy(logits, named[k].expand(len(logits))) for k, logits in enumerate(told)]
        terms["modality"] = Term(torch.stack(modality), settings.modality_weight / count)
        if self.domain_adversary is not None and self.fused_adversary is not None:
            domains = self.context.source_domains(batch)
            with self.context.autocast():
                confused = self.domain_adversary(out.features)
                fused = self.fused_adversary(out.features)
            domain = [cross_entropy(logits, domains) for logits in confused]
            terms["domain"] = Term(torch.stack(domain), settings.domain_weight / count)
            terms["domain_fused"] = Term(cross_entropy(fused, domains), settings.domain_weight)
        elif settings.single_source == "class":
            confused = list(out.unimodal.values())
        if settings.weighting == "off":
            confused = None
        ce = terms["ce"].value
        shares = torch.full_like(ce, 1 / count) if confused is None else self.shares(confused)
        whole = count if settings.weights_sum == "modalities" else 1
        return terms | {"ce": Term(ce, settings.unimodal_weight * whole * shares)}

    def shares(self, confused: Sequence[torch.Tensor]) -> torch.Tensor:
        """softmax_k(E H(p_k) / temperature), [M], of M times logits [B, S] (or [B, C]) that give p_k."""
        entropies = torch.stack(self.context.group.average(mean_entropies(confused)))
        return (entropies / self.settings.temperature).softmax(dim=0)

    @torch.no_grad()
    def figures(
        self, batch: Batch, out: Outputs, loss: torch.Tensor, terms: Mapping[str, Term], **more: torch.Tensor
    ) -> Figures:
        """Those of every method and `w`, [M]: what the uni-modal cross-entropies are multiplied with."""
        return super().figures(batch, out, loss, terms, **more, w=terms["ce"].weight.detach())
