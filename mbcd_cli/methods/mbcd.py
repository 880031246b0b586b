"""MBCD: modality-balanced collaborative distillation (method.md; Wang et al., AAAI 2026, arXiv 2511.20258).

Letters: B clips (of this process), M modalities, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import model_validator

from mbcd_cli.data.records import Batch
from mbcd_cli.methods import gradient_consistency as gcc
from mbcd_cli.methods import modality_dropout as amd
from mbcd_cli.methods.base import Alarm, Context, EpochClips, Figures, Method, Outputs, Panel, Shown, Term, total
from mbcd_cli.methods.conflict import ConflictSettings, conflict
from mbcd_cli.methods.feature_noise import FeatureNoise, FeatureNoiseSettings
from mbcd_cli.methods.gradient_consistency import ConsistencySettings
from mbcd_cli.methods.modality_dropout import DropoutSettings
from mbcd_cli.methods.parts import cross_entropy, distillation, teacher_probabilities
from mbcd_cli.methods.reliability import Reliability, ReliabilitySettings, of_the_others
from mbcd_cli.model import TailWeights
from mbcd_cli.settings import MethodSettings, NonNegative, Range, Slice


class DistillationSettings(Slice):
    """Collaborative distillation from the teacher (Eq. 8)."""

    enabled: bool = True
    """Add lambda * L_dis to the objective."""
    weight: Annotated[NonNegative, Range(0, 2, benchmark=1, only=("enabled", True))] = 1.0
    """lambda of Eq. 9."""


class MBCDSettings(MethodSettings):
    """MBCD (Eq. 9) and its switches."""

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders (Eq. 9), or only probe detached features, to be reported."""
    dropout: DropoutSettings = DropoutSettings()
    """Modality dropout."""
    consistency: ConsistencySettings = ConsistencySettings()
    """Gradient consistency."""
    distillation: DistillationSettings = DistillationSettings()
    """Distillation."""
    feature_noise: FeatureNoiseSettings = FeatureNoiseSettings()
    """Feature noise."""
    reliability: ReliabilitySettings = ReliabilitySettings()
    """Reliability of the modalities."""
    conflict: ConflictSettings = ConflictSettings()
    """Conflicts."""

    @property
    def needs_average(self) -> bool:
        """Whether it distils from the teacher."""
        return self.distillation.enabled

    @model_validator(mode="after")
    def _coherent(self):
        if self.consistency.order != "off" and self.unimodal != "joint":
            raise ValueError("gradient consistency steps along uni-modal gradients: set method.unimodal=joint")
        return self


BALANCE = Panel(
    name="balance",
    title="dominance r_k and drop rate p_k over training",
    figures={
        "r": Shown("$r_k$", axis="$r_k$", row="r_k"),
        "p": Shown("$p_k$", axis="fraction of clips", row="drop rate (%)", scale=100.0),
        "dropped": Shown("dropped", axis="fraction of clips", marker="."),
    },
    note="r_k over 1: more confident than the others on average (Eq. 3), dropped at the rate p_k (Eq. 4).",
)
COLLAPSE = Alarm(
    figure="dropped",
    key="collapse",
    least=0.9,
    text="modality {modality} was dropped from {percent:.0f} % of the clips (modality collapse). The other modalities "
    "may learn nothing: check their inputs, or try method.dropout.strategy=fixed.",
)


class MBCD(Method):
    """Eq. 9: CE_mm(theta') + sum_k CE_k(theta) + lambda (KL_mm(theta') + sum_k KL_k(theta)).

    The first pass of the student (feature noise, uni-modal heads) gives CE_k, KL_k, s_k, r_k, p_k and the inner
    gradient; the second (at theta', no noise, modality dropout) gives CE_mm and KL_mm. With neither consistency nor
    noise the two are the same function of the same weights, and one pass serves both.
    """

    Settings = MBCDSettings
    settings: MBCDSettings
    average = "ema"
    ticker = ("ce_fused", "kl_fused", "r", "p")
    alarms = (COLLAPSE,)
    neutral: ClassVar[Mapping[str, object]] = {
        "unimodal": "probe",
        "dropout": {"strategy": "none"},
        "consistency": {"order": "off"},
        "distillation": {"weight": 0.0},
        "feature_noise": {"enabled": False},
        "conflict": {"weight": 0.0},
    }

    def __init__(self, settings: MBCDSettings, context: Context) -> None:
        super().__init__(settings, context)
        noisy = settings.feature_noise.enabled
        self._noise = (
            FeatureNoise(settings=settings.feature_noise, randomness=context.randomness, group=context.group)
            if noisy
            else None
        )
        self._conflicts = settings.conflict.weight > 0
        self.reliability = None if settings.reliability.by == "none" else Reliability(settings.reliability, context)

    def before_epoch(self, clips: EpochClips) -> None:
        """Losses on the sources' test split, where reliability is read off them."""
        if self.reliability is not None:
            self.reliability.measure(clips)

    @classmethod
    def panels(cls, settings: MBCDSettings) -> tuple[Panel, ...]:
        """The balance, where modalities are dropped."""
        return () if settings.dropout.strategy == "none" else (BALANCE,)

    @property
    def passes(self) -> int:
        """One where both passes would be the same, else two."""
        return 1 if self.settings.consistency.order == "off" and self._noise is None else 2

    def gradients(self, batch: Batch) -> Figures:
        """The gradient of Eq. 9; where consistency is of first order grad[uni](theta) + grad[mm](theta'), at theta."""
        model, weight = self.context.model, self.settings.distillation.weight
        target = self._teacher_probabilities(batch)
        batch = self.at_cut(batch)
        one_pass, joint = self.passes == 1, self.settings.unimodal == "joint"
        with self.context.autocast():
            with torch.set_grad_enabled(one_pass or joint):
                pooled = model.pooled(batch.inputs, noise=self._noise)
                features = model.normalised(pooled)
            unimodal = model.unimodal(self.seen_by_heads(features))
        balance = self._balance(unimodal, features, batch)
        ce = torch.stack([cross_entropy(logits, batch.labels) for logits in unimodal.values()])
        if target is None:
            kl = torch.zeros_like(ce)
        else:
            kl = torch.stack([distillation(target, logits) for logits in unimodal.values()])
        told = kl if balance.heeds is None else balance.heeds * kl
        own = {}
        if self._conflicts:
            own["conflict"] = conflict(self.context, features, unimodal, self.settings.conflict.weight)
        theta = self._inner_step(ce, None if target is None else weight * told.sum())
        with self.context.autocast():
            if not one_pass:
                pooled = model.pooled(batch.inputs, theta=theta)
                features = model.normalised(pooled)
            fused = model.fuse(features, balance.keep)
        ce_fused = cross_entropy(fused, batch.labels)
        kl_fused = torch.zeros_like(ce_fused) if target is None else distillation(target, fused)
        if self.settings.consistency.order == "first":
            self.context.backward(ce_fused + weight * kl_fused)  # on top of what the inner step left
            loss = _total(*(term.detach() for term in (ce_fused, ce, kl_fused, told)), weight)
        else:
            loss = _total(ce_fused, ce, kl_fused, told, weight)
            self.context.backward(loss)
        if own:  # apart from all others': with detached features
            self.context.backward(total(own))
            loss = loss + total(own).detach()
        heeded = weight if balance.heeds is None else weight * balance.heeds
        terms = {"ce_fused": Term(ce_fused), "kl_fused": Term(kl_fused, weight), "ce": Term(ce), "kl": Term(kl, heeded)}
        out = Outputs(pooled, features, unimodal, fused)
        dropped = torch.zeros_like(balance.p) if balance.keep is None else 1 - balance.keep.mean(dim=0)
        more = {} if balance.q is None else {"q": balance.q}
        return self.figures(
            batch, out, loss, terms | own, s=balance.s, r=balance.r, p=balance.p, dropped=dropped, **more
        )

    def _inner_step(self, ce: torch.Tensor, kl: torch.Tensor | None) -> TailWeights | None:
        """theta' (Eq. 5), or None where there is no inner step; `kl` is the distillation of the uni-modal heads, [].

        The first order leaves the gradient of both in `.grad`: its own is their first part, and back-propagating the
        rest at once frees the first pass' activations before the second pass makes its own.
        """
        order, alpha = self.settings.consistency.order, self.settings.consistency.alpha
        if order == "off":
            return None
        context, weights = self.context, self.context.model.theta()
        theta = gcc.in_order(weights)
        if order == "second":
            gradients = context.gradients(ce.sum(), theta, create_graph=True)
            return gcc.inner_step(weights, context.group.average(gradients), alpha=alpha)
        trained = [*theta, *context.model.heads.parameters()]
        gradients = context.gradients(ce.sum(), trained, retain_graph=kl is not None)
        context.group.average_(gradients)
        # The graph of theta' is the identity to theta, so that the fused gradient accumulates in theta's own.
        stepped = gcc.inner_step(weights, gradients[: len(theta)], alpha=alpha)
        for parameter, gradient in zip(trained, gradients, strict=True):
            context.set_gradient(parameter, gradient)
        if kl is not None:
            context.backward(kl)
        return stepped

    @torch.no_grad()
    def _balance(
        self, unimodal: Mapping[str, torch.Tensor], features: Mapping[str, torch.Tensor], batch: Batch
    ) -> _Balance:
        dropout, group, logits = self.settings.dropout, self.context.group, list(unimodal.values())
        s = group.sum_(amd.scores(logits, batch.labels, score=dropout.score))
        r = amd.ratios(s)
        p = amd.drop_probabilities(r, dropout)
        q = heeds = keep = None
        if self.reliability is not None:
            q = self.reliability.q(features, batch)
            rest, power = of_the_others(q), self.reliability.power
            p, heeds = p * rest.clamp(max=1) ** power, (1 / rest).clamp(max=1) ** power
        if dropout.strategy != "none":
            keep = group.own(amd.keep_mask(p, len(batch) * group.world, self.context.randomness))
            if dropout.agreement:
                keep = amd.only_where_others_agree(keep, logits, batch.labels)
        return _Balance(s=s, r=r, p=p, keep=keep, q=q, heeds=heeds)

    def _teacher_probabilities(self, batch: Batch) -> torch.Tensor | None:
        """p_EMA [B, C] of the batch as the dataset gives it (the teacher has its own live trunks); None: no teacher."""
        average = self.context.average
        if average is None or not self.settings.distillation.enabled:
            return None
        with self.context.autocast(), torch.no_grad():
            teacher = average.model
            return teacher_probabilities(teacher.fuse(teacher.features(teacher.at_cut(batch.inputs))))


def _total(
    ce_fused: torch.Tensor, ce: torch.Tensor, kl_fused: torch.Tensor, kl: torch.Tensor, weight: float
) -> torch.Tensor:
    return ce_fused + ce.sum() + weight * (kl_fused + kl.sum())


@dataclass(frozen=True, slots=True)
class _Balance:
    """Eq. 2-4 of one batch: s, r, p [M], and the mask [B, M] or None.

    Attributes:
        q: reliability, [M]; None where none is asked for.
        heeds: what the distillation into each modality is multiplied with, [M].
    """

    s: torch.Tensor
    r: torch.Tensor
    p: torch.Tensor
    keep: torch.Tensor | None
    q: torch.Tensor | None
    heeds: torch.Tensor | None
