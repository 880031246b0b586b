"""SimMMDG (Dong et al., NeurIPS 2023, arXiv 2310.19795): shared and specific halves of every feature.

Letters: B clips, M modalities, D_k features of modality k.
"""

from __future__ import annotations

from typing import Annotated

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, Method, Outputs, Term
from mbcd_cli.methods.parts import (
    Translators,
    halves_apart,
    shared_projections,
    shared_rows,
    supervised_contrast,
    translation,
)
from mbcd_cli.settings import Count, MethodSettings, NonNegative, Positive, Range

_OWN = ("name", "simmmdg")  # the public benchmark leaves them as they are in MOOSA


class SimMMDGSettings(MethodSettings):
    """SimMMDG."""

    translation: Annotated[NonNegative, Range(0, 1, benchmark=1, only=_OWN)] = 0.1
    """Weight of the translation of each modality's feature into the others'."""
    contrast: Annotated[NonNegative, Range(0, 5, benchmark=1, only=_OWN)] = 3.0
    """Weight of the supervised contrast of the shared halves."""
    distance: Annotated[NonNegative, Range(0, 1, benchmark=1, only=_OWN)] = 0.7
    """Weight of the distance between the shared and the specific half of a feature."""
    hidden: Count = 2048
    """Width of the projections and translators."""
    temperature: Positive = 0.1
    """Temperature of the contrast."""


class SimMMDG(Method):
    """CE(fused) + a_t trans(h, h) + a_c supcon({hat(P_k(shared half of h_k))}) + a_d dist(h), in one pass.

    trans is the mean over ordered pairs of E ||hat(T_{j->k}(h_j)) - hat(h_k)||_2, dist the negative mean squared
    difference of the two halves of h_k. The translators serve training only.
    """

    Settings = SimMMDGSettings
    settings: SimMMDGSettings
    ticker = ("ce_fused", "contrast")

    def __init__(self, settings: SimMMDGSettings, context: Context) -> None:
        super().__init__(settings, context)
        dims = context.model.dims
        self.projections = shared_projections(dims, hidden=settings.hidden, method=settings.name)
        self.translators = Translators(dims, hidden=settings.hidden)

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, `translation`, `contrast` and `distance`."""
        settings = self.settings
        with self.context.autocast():
            translated = self.translators(self.translated_from(out))
            projected = shared_rows(self.projections, out.features)
        return super().losses(batch, out) | {
            "translation": Term(translation(translated, out.features), settings.translation),
            "contrast": Term(
                supervised_contrast(
                    projected, batch.labels, temperature=settings.temperature, group=self.context.group
                ),
                settings.contrast,
            ),
            "distance": Term(halves_apart(out.features), settings.distance),
        }

    def translated_from(self, out: Outputs) -> dict[str, torch.Tensor]:
        """What the translators read, each [B, D_k]."""
        return dict(out.features)
