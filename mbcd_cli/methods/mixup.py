"""Mixup (Zhang, Cisse, Dauphin, Lopez-Paz, ICLR 2018, arXiv 1710.09412), of clips with all their modalities.

Letters: B clips of the global batch, b of this process, D_k features of modality k.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from scipy.special import betaincinv

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, Figures, Method, Outputs, Term, total
from mbcd_cli.methods.parts import need_domains
from mbcd_cli.processes import Group
from mbcd_cli.settings import AROUND, MethodSettings, NonNegative

QUANTILES = 4096
"""How finely the Beta distribution is tabulated."""


class MixupSettings(MethodSettings):
    """Mixup."""

    alpha: Annotated[NonNegative, AROUND] = 0.2
    """Both parameters of the Beta distribution of lambda; with 0 nothing is mixed."""
    at: Literal["cut", "features"] = "cut"
    """What is mixed: what enters the trained tails (the clip itself at the cut `input`), or what the heads read."""
    partner: Literal["any", "domain"] = "any"
    """Whom a clip is mixed with: one of a shuffled batch (the paper), or one of another source domain."""


class Mixup(Method):
    """L = lambda CE(f(x), y_i) + (1 - lambda) CE(f(x), y_j) on x = lambda x_i + (1 - lambda) x_j, lambda ~ Beta.

    One lambda per batch and one partner j per clip i hold for all modalities. With `partner = "domain"` j is drawn from
    the clips of other source domains (the clip itself where the batch has none). The figures are those of mixed clips.
    """

    Settings = MixupSettings
    settings: MixupSettings
    ticker = ("ce_fused", "kept")
    neutral: ClassVar[dict[str, object]] = {"alpha": 0.0}

    def __init__(self, settings: MixupSettings, context: Context) -> None:
        super().__init__(settings, context)
        if settings.partner == "domain":
            need_domains(settings.name, len(context.sources))
        self.register_buffer("quantiles", beta_quantiles(settings.alpha), persistent=False)

    def gradients(self, batch: Batch) -> Figures:
        """The gradient of both labels' losses on mixed clips, in one pass."""
        context, model, at = self.context, self.context.model, self.settings.at
        batch = self.at_cut(batch)
        kept, partner = self.draw(batch)
        mix = partial(mixed, kept=kept, partner=partner, group=context.group)
        inputs = batch.inputs
        with context.autocast():
            if at == "cut":
                inputs = {name: tuple(map(mix, parts)) for name, parts in inputs.items()}
            pooled = model.pooled(inputs)
            features = model.normalised(pooled)
            if at == "features":
                features = {name: mix(h) for name, h in features.items()}
            out = Outputs(pooled, features, model.unimodal(self.seen_by_heads(features)), model.fuse(features))
        theirs = replace(batch, labels=context.group.gather(batch.labels)[partner])
        own, other = self.losses(batch, out), self.losses(theirs, out)
        terms = {n: Term(kept * own[n].value + (1 - kept) * other[n].value, own[n].weight) for n in own}
        loss = total(terms)
        context.backward(loss)
        return self.figures(batch, out, loss, terms, kept=kept)

    @torch.no_grad()
    def draw(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """lambda [], and each own clip's partner in the global batch, [b]."""
        randomness, group = self.context.randomness, self.context.group
        kept = self.quantiles[(randomness.uniform(1) * QUANTILES).to(torch.int64)][0]
        clips = len(batch) * group.world
        if self.settings.partner == "any":
            return kept, group.own(randomness.uniform(clips).argsort())
        domains = group.gather(self.context.source_domains(batch))
        order = randomness.uniform(clips, clips).masked_fill(domains[:, None] == domains[None, :], -1.0)
        itself = torch.eye(clips, dtype=torch.bool, device=order.device)
        # Above the others of the same domain, below all of another.
        return kept, group.own(order.masked_fill(itself, -0.5).argmax(dim=1))


def mixed(x: torch.Tensor, *, kept: torch.Tensor, partner: torch.Tensor, group: Group) -> torch.Tensor:
    """kept x_i + (1 - kept) x_j of own rows x [b, ...]; kept [], partner j [b] in the global batch."""
    kept = kept.to(x.dtype)
    return kept * x + (1 - kept) * group.gather(x)[partner]


def beta_quantiles(alpha: float, *, above: float = 0.0) -> torch.Tensor:
    """Quantiles of Beta(alpha, alpha) at the middles of equal shares, [QUANTILES]; ones for alpha = 0.

    With `above` = 0.5 those of max(b, 1 - b), b ~ Beta(alpha, alpha): the upper half. A uniform draw picks one of
    them: sampling by rejection would wait for the device.
    """
    share = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    share = above + (1 - above) * share
    return torch.from_numpy(betaincinv(alpha, alpha, share.numpy())) if alpha else torch.ones_like(share)
