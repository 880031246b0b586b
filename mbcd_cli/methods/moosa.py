"""MOOSA: multi-modal open-set adaptation and generalisation (Dong, Chatzi, Fink, ECCV 2024, arXiv 2407.01518).

Letters: B clips (of this process), M modalities, C classes, D_k features of modality k, P permutations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Annotated, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from mbcd_cli.data.records import Batch
from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.base import Context, Outputs, Term
from mbcd_cli.methods.parts import cross_entropy, full_precision
from mbcd_cli.methods.simmmdg import SimMMDG, SimMMDGSettings
from mbcd_cli.processes import Group
from mbcd_cli.settings import Count, Fraction, NonNegative, Positive, Range


class MOOSASettings(SimMMDGSettings):
    """MOOSA."""

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders (the paper), or only probe detached features."""
    weighting: Literal["clip", "batch", "off"] = "clip"
    """Entropy weights of the heads per clip (the paper), of batch means (the public benchmark), or a plain sum."""
    weighting_temperature: Positive = 1.0
    """T of the entropy weights."""
    entropy: Annotated[NonNegative, Range(0, 1, benchmark=4)] = 0.001
    """Weight of the entropy minimisation."""
    jigsaw: Annotated[NonNegative, Range(0, 3, benchmark=1)] = 1.0
    """Weight of the jigsaw of feature parts."""
    parts: Count | None = None
    """s, parts of a feature in the jigsaw; default: 4 of one or two modalities, 2 of more (the authors')."""
    permutations: Count = 128
    """P, permutations of the jigsaw; all, where there are fewer."""
    masked: Annotated[Fraction, Range(0, 1, benchmark=1)] = 0.3
    """r, the fraction of a feature's entries that is hidden from the translators."""


class MOOSA(SimMMDG):
    """SimMMDG with entropy-weighted heads, entropy minimisation, masked translation and a jigsaw of feature parts.

    Branches b are the M uni-modal heads and the fused one: the cross-entropy is E sum_b w_ib ce_ib, with
    w_ib = softmax_b(-H(p_ib) / T), not detached. The translators read g_k = h_k with entries zeroed with probability r.
    The jigsaw cuts each h_k into s equal parts and classifies in which of P fixed orders all M s parts stand.
    """

    Settings = MOOSASettings
    settings: MOOSASettings
    ticker = ("ce_fused", "weighted_ce", "jigsaw")
    symmetric = False  # the jigsaw's orders are drawn over parts in fusion order
    neutral: ClassVar[Mapping[str, object]] = {
        "weighting": "off",
        **dict.fromkeys(("entropy", "jigsaw", "translation", "contrast", "distance"), 0.0),
    }

    def __init__(self, settings: MOOSASettings, context: Context) -> None:
        super().__init__(settings, context)
        dims = context.model.dims
        parts = settings.parts or (4 if len(dims) <= 2 else 2)
        narrow = [name for name, dim in dims.items() if dim < parts]
        if narrow:
            raise SettingsError(
                f"Method {settings.name} cuts features into {parts} parts, and {', '.join(narrow)} has fewer features.",
                f"Set method.parts to {min(dims.values())} or less.",
            )
        orders = drawn_orders(len(dims) * parts, settings.permutations)
        self.register_buffer("columns", jigsaw_columns(list(dims.values()), parts, orders))
        self.puzzle = nn.Sequential(
            nn.Linear(self.columns.shape[1], 512), nn.ReLU(inplace=True), nn.Linear(512, len(orders))
        )

    def translated_from(self, out: Outputs) -> dict[str, torch.Tensor]:
        """g_k, [B, D_k]: features with entries hidden, one mask per modality and clip."""
        widths = [h.shape[1] for h in out.features.values()]
        clips = len(out.fused) * self.context.group.world
        seen = self.context.group.own(self.context.randomness.uniform(clips, sum(widths))) >= self.settings.masked
        masks = seen.split(widths, dim=1)
        return {name: h * mask.to(h.dtype) for (name, h), mask in zip(out.features.items(), masks, strict=True)}

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
        """SimMMDG's terms, `weighted_ce` in the place of both cross-entropies, `entropy` and `jigsaw`."""
        settings, terms = self.settings, super().losses(batch, out)
        branches = [*out.unimodal.values(), out.fused]
        if settings.weighting != "off":
            weighted = weighted_cross_entropy(
                branches,
                batch.labels,
                temperature=settings.weighting_temperature,
                per_clip=settings.weighting == "clip",
                group=self.context.group,
            )
            terms |= {name: Term(terms[name].value, 0.0) for name in ("ce_fused", "ce")}
            terms["weighted_ce"] = Term(weighted)
        return terms | {
            "entropy": Term(branch_entropy(branches), settings.entropy),
            "jigsaw": Term(self.jigsaw(out), settings.jigsaw),
        }

    def jigsaw(self, out: Outputs) -> torch.Tensor:
        """Cross-entropy of the orders over P B rows, []."""
        with self.context.autocast():
            features = torch.cat(list(out.features.values()), dim=1)
            # Not features[:, columns], whose gradient is summed in another order below vmap.
            pieces = features.index_select(1, self.columns.flatten()).unflatten(1, self.columns.shape)
            logits = self.puzzle(pieces.flatten(0, 1))  # [B P, ...]
        orders = torch.arange(len(self.columns), device=logits.device)
        return cross_entropy(logits, orders.repeat(len(features)))


def weighted_cross_entropy(
    branches: Sequence[torch.Tensor], labels: torch.Tensor, *, temperature: float, per_clip: bool, group: Group
) -> torch.Tensor:
    """E sum_b w_ib ce_ib over branches, each [B, C], or (not per clip) sum_b E[w_ib] E[ce_ib], []."""
    logs = torch.stack([full_precision(logits).log_softmax(dim=1) for logits in branches])
    weights = ((logs.exp() * logs).sum(dim=2) / temperature).softmax(dim=0)
    rows = torch.stack([F.nll_loss(log, labels, reduction="none") for log in logs])
    if per_clip:
        return (weights * rows).sum(dim=0).mean()
    weight, mean = group.average([weights.mean(dim=1), rows.mean(dim=1)])
    return (weight * mean).sum()


def branch_entropy(branches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over branches, each [B, C], of E[-sum_c p log(p + 1e-5)], []."""
    p = torch.stack([full_precision(logits).softmax(dim=1) for logits in branches])
    return -(p * (p + 1e-5).log()).sum(dim=2).mean()


def drawn_orders(parts: int, count: int) -> list[tuple[int, ...]]:
    """`count` distinct permutations of the parts, from torch's global generator; all of them, where there are fewer."""
    if math.factorial(parts) <= count:
        return list(permutations(range(parts)))
    orders: dict[tuple[int, ...], None] = {}
    while len(orders) < count:
        orders[tuple(torch.randperm(parts).tolist())] = None
    return list(orders)


def jigsaw_columns(dims: Sequence[int], parts: int, orders: Sequence[Sequence[int]]) -> torch.Tensor:
    """Columns of the concatenated features in every order, [P, sum_k s floor(D_k / s)]; a remainder is left out."""
    pieces: list[torch.Tensor] = []
    for k, dim in enumerate(dims):
        first, width = sum(dims[:k]), dim // parts
        pieces += [torch.arange(first + i * width, first + (i + 1) * width) for i in range(parts)]
    return torch.stack([torch.cat([pieces[piece] for piece in order]) for order in orders])
