"""The multi-modal model: (live trunks,) tails, norm on pooled features, uni-modal heads and the fused head.

Letters: B clips, M modalities, C classes, D_k features of modality k.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.encoders import cut_encoder
from mbcd_cli.encoders.staged import Noise, Parts, Tail, Trunk
from mbcd_cli.layers import rounding_alike
from mbcd_cli.settings import ModelSettings

TailWeights = Mapping[str, Mapping[str, torch.Tensor]]
"""Modality -> name of a tail's parameter -> tensor."""


def head(inside: int, *, settings: ModelSettings, classes: int, linear: bool) -> nn.Module:
    """Linear(D, C), or Linear(D, hidden), ReLU, Dropout, Linear(hidden, C)."""
    if linear:
        return nn.Linear(inside, classes)
    return nn.Sequential(
        nn.Linear(inside, settings.hidden),
        nn.ReLU(),
        nn.Dropout(settings.dropout),
        nn.Linear(settings.hidden, classes),
    )


class MultiModalModel(nn.Module):
    """Encoders' tails theta_k, uni-modal heads phi_k and the fused head phi_mm.

    Args:
        tails: modality -> tail, in fusion order.
        settings: norm, dropout and heads.
        classes: C.
        trunks: modality -> live trunk, where the frozen stages run with the model (`at_cut`) because their batch norms
            follow the training; none where the model's inputs come from a cache of trunk outputs.
    """

    def __init__(
        self,
        tails: Mapping[str, Tail],
        *,
        settings: ModelSettings,
        classes: int,
        trunks: Mapping[str, Trunk] | None = None,
    ) -> None:
        super().__init__()
        self.modalities = tuple(tails)
        self.classes = classes
        self.dims = {name: tail.dim for name, tail in tails.items()}
        self.trunks = nn.ModuleDict(trunks or {})
        self.tails = nn.ModuleDict(tails)
        # The affine parameters of the LayerNorm are never optimised in the reference: identity, so there are none.
        layer_norm = settings.norm == "layer"
        self.norms = nn.ModuleDict(
            {
                n: nn.LayerNorm(d, elementwise_affine=False) if layer_norm else nn.Identity()
                for n, d in self.dims.items()
            }
        )
        dropped = (settings.feature_dropout_on or self.modalities) if settings.feature_dropout else ()
        self.feature_dropouts = nn.ModuleDict(
            {n: nn.Dropout(settings.feature_dropout) for n in self.modalities if n in dropped}
        )
        linear = settings.unimodal_head == "linear"
        self.heads = nn.ModuleDict(
            {n: head(d, settings=settings, classes=classes, linear=linear) for n, d in self.dims.items()}
        )
        linear = settings.fused_head == "linear"
        self.fused_head = head(sum(self.dims.values()), settings=settings, classes=classes, linear=linear)
        self._trained = {
            name: tuple(key for key, value in tail.named_parameters() if value.requires_grad)
            for name, tail in self.tails.items()
        }

    def theta(self) -> dict[str, dict[str, torch.Tensor]]:
        """theta_k: the parameters of every tail that train, by name and each of its own shape, as they are now."""
        return {
            name: {key: value for key, value in self.tails[name].named_parameters() if key in self._trained[name]}
            for name in self.modalities
        }

    def at_cut(self, inputs: Mapping[str, Parts]) -> dict[str, Parts]:
        """Inputs as the dataset gives them -> parts at the cut, each [B, ...]: through the live trunks, where there are
        any."""
        return {name: self.through_trunk(name, inputs[name]) for name in self.modalities}

    def through_trunk(self, name: str, parts: Parts) -> Parts:
        """`at_cut`, of one modality."""
        return self.trunks[name](parts) if name in self.trunks else parts

    def pool(self, name: str, parts: Parts, noise: Noise | None = None) -> torch.Tensor:
        """Parts of modality `name` at the cut -> pooled features before the norm, [B, D_k]."""
        return self._dropped(name, self.tails[name](parts, noise))

    def pooled(
        self, inputs: Mapping[str, Parts], *, noise: Noise | None = None, theta: TailWeights | None = None
    ) -> dict[str, torch.Tensor]:
        """Parts at the cut -> pooled features of every modality before the norm, each [B, D_k].

        Args:
            theta: parameters to use instead of the tails' own; buffers stay the model's, so that batch norm updates
                its running statistics as in any other pass.
        """
        if theta is None:
            return {name: self.pool(name, inputs[name], noise) for name in self.modalities}
        return {
            name: self._dropped(name, functional_call(self.tails[name], dict(theta[name]), (inputs[name], noise)))
            for name in self.modalities
        }

    def _dropped(self, name: str, pooled: torch.Tensor) -> torch.Tensor:
        return self.feature_dropouts[name](pooled) if name in self.feature_dropouts else pooled

    def normalised(self, pooled: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Pooled features -> normalised ones h_k, each [B, D_k]."""
        return {name: self.norms[name](pooled[name]) for name in self.modalities}

    def encode(self, name: str, parts: Parts) -> torch.Tensor:
        """Parts of modality `name` at the cut -> normalised pooled features h_k, [B, D_k]."""
        return self.norms[name](self.pool(name, parts))

    def features(self, inputs: Mapping[str, Parts]) -> dict[str, torch.Tensor]:
        """Parts at the cut -> normalised pooled features of every modality, each [B, D_k]."""
        return {name: self.encode(name, inputs[name]) for name in self.modalities}

    def unimodal(self, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Uni-modal logits, each [B, C]."""
        return {name: self.heads[name](features[name]) for name in self.modalities}

    def fuse(self, features: Mapping[str, torch.Tensor], keep: torch.Tensor | None = None) -> torch.Tensor:
        """Fused logits [B, C] from features; `keep` [B, M] of 0/1 zeroes dropped modalities (no rescaling)."""
        columns = [features[name] for name in self.modalities]
        if keep is not None:
            columns = [column * keep[:, k : k + 1].to(column.dtype) for k, column in enumerate(columns)]
        return self.fused_head(torch.cat(columns, dim=1))

    def forward(self, inputs: Mapping[str, Parts]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Inputs as the dataset gives them -> (fused logits [B, C], uni-modal logits each [B, C])."""
        features = self.features(self.at_cut(inputs))
        return self.fuse(features), self.unimodal(features)


def build_model(
    modalities: Mapping[str, Modality],
    *,
    settings: ModelSettings,
    classes: int,
    live_trunks: bool = False,
    tail_weights: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    trunk_weights: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> MultiModalModel:
    """The model for `modalities` (in fusion order), each encoder cut as its settings say.

    Args:
        modalities: modality -> its settings.
        settings: heads, and whether the tails train; where they do not, live trunks stay in eval mode, too.
        classes: C.
        live_trunks: the frozen stages are part of the model (`cache.trunk_batch_norm = "batch"`).
        tail_weights, trunk_weights: modality -> initial state dict, as `prepare` stored it beside the cache.

    Raises:
        SettingsError: an unknown encoder or cut. CacheError: stored weights that do not fit.
    """
    tails, trunks = {}, {}
    for name, modality in modalities.items():
        trunk, tail = cut_encoder(name, modality, live=live_trunks, frozen=settings.tails == "frozen")
        if tail_weights and name in tail_weights:
            tail.load_prepared(tail_weights[name], name)
        tails[name] = tail
        if live_trunks and trunk.names:
            if trunk_weights and name in trunk_weights:
                trunk.load_prepared(trunk_weights[name], name)
            trunks[name] = trunk
    model = MultiModalModel(tails, settings=settings, classes=classes, trunks=trunks)
    for part in model.children():
        if part is not model.trunks:  # they are what `prepare` runs
            rounding_alike(part)
    return model
