"""CMRF: cross-modal representation flattening (Fan, Xu, Wang, Guo, NeurIPS 2024), in the authors' form.

Letters: B clips (of this process), M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, Figures, Method, Outputs, Term, total
from mbcd_cli.methods.mixup import QUANTILES, beta_quantiles
from mbcd_cli.methods.parts import known_modalities, projection, row_distance, supervised_contrast, unit_rows
from mbcd_cli.methods.simmmdg import SimMMDG, SimMMDGSettings
from mbcd_cli.settings import Count, MethodSettings, Names, NonNegative, Positive, Range


class CMRFSettings(MethodSettings):
    """CMRF; the step from which weights are averaged, and the distillation begins, is `average.start`."""

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders (the paper), or only probe detached features, to be reported."""
    unimodal_weight: Annotated[NonNegative, Range(0, 5, benchmark=1)] = 2.0
    """Weight of the uni-modal cross-entropies."""
    contrast: NonNegative = 3.0
    """Weight of the supervised contrast of the projected features."""
    distillation: Annotated[NonNegative, Range(0, 5, benchmark=1)] = 3.0
    """Weight of the distillation of interpolated teacher features."""
    modality_weights: dict[str, NonNegative] = Field(default={"audio": 0.5})
    """w_k of a modality, in its cross-entropy and distillation; 1 for those that are not named."""
    beta: Positive = 0.1
    """Both parameters of the Beta distribution of the interpolation."""
    hidden: Count = 2048
    """Width of the projections (and translators)."""
    temperature: Positive = 0.1
    """Temperature of the contrast."""
    simmmdg: NonNegative = 0.0
    """Weight of SimMMDG's three terms, with own modules, on top (1: the public benchmark's second version)."""
    random_projections: Names = ()
    """Modalities whose P_k stays as it was drawn (the public benchmark's second version: video and flow)."""

    @property
    def needs_average(self) -> bool:
        """It distils from the teacher, which is what it deploys."""
        return True


class CMRF(Method):
    """CE(fused) + c_u sum_k w_k CE_k + c_c supcon({z_k}) + c_d sum_k w_k dist_k.

    dist_k = sum_{j != k} E ||hat(l bar z_k + (1 - l) bar z_j) - z_k||_2.
    z_k = hat(P_k(h_k)), bar z_k that of the teacher, the simple mean of the weights from step t0 on; the last term, a
    sum over ordered pairs and no mean, counts only after t0. l = max(b, 1 - b), b ~ Beta(0.1, 0.1), per clip and pair.
    `simmmdg` adds the terms of that method.
    """

    Settings = CMRFSettings
    settings: CMRFSettings
    average = "sma"
    average_start = 100
    ticker = ("ce_fused", "contrast", "distillation")
    neutral: ClassVar[Mapping[str, object]] = {
        "unimodal_weight": 1.0,
        "contrast": 0.0,
        "distillation": 0.0,
        "simmmdg": 0.0,
    }

    def __init__(self, settings: CMRFSettings, context: Context) -> None:
        super().__init__(settings, context)
        assert context.average is not None, "settings without an average are refused"
        dims = context.model.dims
        self.projections = nn.ModuleDict({n: projection(d, hidden=settings.hidden) for n, d in dims.items()})
        for field in ("modality_weights", "random_projections"):
            known_modalities(f"method.{field}", getattr(settings, field), dims)
        for name in dims.keys() & set(settings.random_projections):
            self.projections[name].requires_grad_(False)
        self.teacher_projections = context.average.follow(self.projections)
        weights = torch.tensor([settings.modality_weights.get(name, 1.0) for name in dims], dtype=torch.float64)
        self.register_buffer("modality_weights", weights, persistent=False)
        self.register_buffer("mixing", beta_quantiles(settings.beta, above=0.5), persistent=False)
        self.simmmdg = None
        if settings.simmmdg:
            own = SimMMDGSettings(name=settings.name, hidden=settings.hidden, temperature=settings.temperature)
            self.simmmdg = SimMMDG(own, context)

    def gradients(self, batch: Batch) -> Figures:
        """The gradient of all terms; the teacher, with its own live trunks, reads the batch as the dataset gives it."""
        settings, context = self.settings, self.context
        targets = self.teacher_rows(batch)
        batch = self.at_cut(batch)
        out = self(batch)
        with context.autocast():
            rows = {name: unit_rows(self.projections[name](h)) for name, h in out.features.items()}
        contrast = supervised_contrast(
            list(rows.values()), batch.labels, temperature=settings.temperature, group=context.group
        )
        begun = (context.step > context.average.start).to(contrast.dtype)
        terms = self.losses(batch, out) | {
            "contrast": Term(contrast, settings.contrast),
            "distillation": Term(self.distilled(rows, targets), settings.distillation * begun * self.modality_weights),
        }
        loss = total(terms)
        context.backward(loss)
        return self.figures(batch, out, loss, terms)

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, the uni-modal ones weighted, and SimMMDG's where they are asked for."""
        terms = super().losses(batch, out)
        if self.simmmdg is not None:
            theirs = self.simmmdg.losses(batch, out)
            own = {name: theirs[name] for name in ("translation", "distance")} | {"contrast_halves": theirs["contrast"]}
            terms |= {name: Term(term.value, self.settings.simmmdg * term.weight) for name, term in own.items()}
        return terms | {"ce": Term(terms["ce"].value, self.settings.unimodal_weight * self.modality_weights)}

    @torch.no_grad()
    def teacher_rows(self, batch: Batch) -> dict[str, torch.Tensor]:
        """bar z_k of every modality, each [B, 128]."""
        teacher = self.context.average.model
        with self.context.autocast():
            features = teacher.features(teacher.at_cut(batch.inputs))
            return {name: unit_rows(self.teacher_projections[name](h)) for name, h in features.items()}

    def distilled(self, rows: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """sum_{j != k} E ||hat(l bar z_k + (1 - l) bar z_j) - z_k|| of every k, [M]; zeros for a single modality."""
        context, pairs = self.context, list(permutations(rows, 2))
        sums = {name: z.sum() * 0 for name, z in rows.items()}
        if pairs:
            clips = len(next(iter(rows.values()))) * context.group.world
            drawn = (context.randomness.uniform(clips, len(pairs)) * QUANTILES).to(torch.int64)
            for (k, j), kept in zip(pairs, context.group.own(self.mixing[drawn]).unbind(dim=1), strict=True):
                sums[k] = sums[k] + interpolation_distance(rows[k], targets[k], targets[j], kept)
        return torch.stack(list(sums.values()))


def interpolation_distance(
    rows: torch.Tensor, own: torch.Tensor, other: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """E ||hat(l own + (1 - l) other) - rows||_2 with l = kept [B] and unit rows [B, D], []."""
    kept = kept[:, None].to(own.dtype)
    return row_distance(unit_rows(kept * own + (1 - kept) * other), rows)
