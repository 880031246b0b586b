"""SimMMDG (Dong et al., NeurIPS 2023, arXiv 2310.19795): shared and specific halves of every feature.

Letters: B clips, M modalities, D_k features of modality k.
"""

from __future__ import annotations

import torch
from torch import nn

from mbcd_cli.data.records import Batch
from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.base import Context, Method, Outputs, Term
from mbcd_cli.methods.own_settings import SimMMDGSettings
from mbcd_cli.methods.parts import (
    Translators,
    halves,
    halves_apart,
    projection,
    supervised_contrast,
    translation,
    unit_rows,
)


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
        narrow = [name for name, dim in dims.items() if dim < 2]
        if narrow:
            raise SettingsError(
                f"Method {settings.name} splits features into halves, and {', '.join(narrow)} has a single one.",
                "Give it an encoder with more features, or leave it out of model.modalities.",
            )
        self.projections = nn.ModuleDict({n: projection(d // 2, hidden=settings.hidden) for n, d in dims.items()})
        self.translators = Translators(dims, hidden=settings.hidden)

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """ERM's terms, `translation`, `contrast` and `distance`."""
        settings = self.settings
        with self.context.autocast():
            translated = self.translators(self.translated_from(out))
            projected = self.projected(out)
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

    def projected(self, out: Outputs) -> list[torch.Tensor]:
        """z_k: M times unit rows [B, 128]."""
        shared = [half for half, _ in halves(out.features)]
        return [unit_rows(self.projections[n](half)) for n, half in zip(out.features, shared, strict=True)]
