"""Rules of adaptation at test time: a loss of a batch's logits without labels, and the parameters that it moves.

Letters: B clips of a batch, M modalities, C classes; p = softmax(logits), H(p) = -sum_c p_c log p_c in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mbcd_cli.errors import MbcdError
from mbcd_cli.model import MultiModalModel
from mbcd_cli.settings import AdaptSettings

Moment = Literal["before", "after"]
"""Of a prediction: the pass whose logits the (first) step's loss is of, or a pass after the (last) step."""

_IN_LOG = 1e-9
"""AEO's own entropies are -sum_c p_c log(p_c + 1e-9)."""


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H(softmax(logits)) over the last dimension: [..., C] -> [...]."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def balance(logits: torch.Tensor) -> torch.Tensor:
    """H(softmax_c(sum_i p_ic)) of logits [B, C]: of a sum, not a mean, so that it depends on B (READ's equation)."""
    return entropy(logits.softmax(1).sum(0))


def tent_loss(fused: torch.Tensor, unimodal: Mapping[str, torch.Tensor], settings: AdaptSettings) -> torch.Tensor:
    """E[H(p)] of the fused logits [B, C] (TENT, ICLR 2021)."""
    return entropy(fused).mean()


def read_loss(fused: torch.Tensor, unimodal: Mapping[str, torch.Tensor], settings: AdaptSettings) -> torch.Tensor:
    """E[-m log m] - `balance`, m = max_c p (READ, ICLR 2024, whose gamma = 1 / e gives this)."""
    log_m = fused.log_softmax(1).max(1).values
    return -(log_m.exp() * log_m).mean() - balance(fused)


def aeo_loss(fused: torch.Tensor, unimodal: Mapping[str, torch.Tensor], settings: AdaptSettings) -> torch.Tensor:
    """E[-h w] + a (mean over pairs of E[-||p_k - p_j||_1 w] + mean_k E[-h_k w]) - b `balance` (AEO, ICLR 2025).

    h = -sum_c p_c log(p_c + 1e-9) / log C of the fused logits [B, C], h_k of the uni-modal ones;
    w = tanh(4 (h - alpha)) carries gradient. With one modality there are no pairs. log C is exact (its code rounds it
    to float32).
    """

    def share(p: torch.Tensor) -> torch.Tensor:
        return -(p * (p + _IN_LOG).log()).sum(1) / math.log(p.shape[1])

    h, p = share(fused.softmax(1)), [logits.softmax(1) for logits in unimodal.values()]
    w = torch.tanh(4 * (h - settings.alpha))
    apart = [(-(one - other).abs().sum(1) * w).mean() for one, other in combinations(p, 2)]
    of_modalities = torch.stack([(-share(each) * w).mean() for each in p]).mean()
    of_modalities = of_modalities + (torch.stack(apart).mean() if apart else 0.0)
    return (-h * w).mean() + settings.unimodal_weight * of_modalities - settings.balance_weight * balance(fused)


def _trained_modules(model: MultiModalModel) -> Iterator[tuple[str, nn.Module]]:
    """Modules after the frozen stages, with their names in the model."""
    frozen = tuple(f"tails.{name}.{stage}" for name, tail in model.tails.items() for stage in tail.frozen)
    for name, module in model.named_modules():
        if not any(f"{name}.".startswith(f"{above}.") for above in ("trunks", *frozen)):
            yield name, module


def _normalisation(model: MultiModalModel, settings: AdaptSettings) -> dict[str, nn.Parameter]:
    """Weight and bias of every normalisation layer; batch norms take the batch's statistics.

    A layer is told by its class's name, so that those of a user's encoder (RMSNorm and the like) count.
    """
    model.eval()
    moved = {}
    for name, module in _trained_modules(model):
        if isinstance(module, _BatchNorm):
            module.train()
        if "norm" in type(module).__name__.lower():
            own = module.named_parameters(prefix=name, recurse=False)
            moved |= {key: value for key, value in own if key.rpartition(".")[2] in ("weight", "bias")}
    if not moved:
        raise MbcdError(
            f"TENT moves normalisation layers, and the trained tails of {', '.join(model.modalities)} have none with a "
            "weight or bias.",
            "Use --rule read or aeo.",
        )
    return moved


def _first_of_fusion(model: MultiModalModel, settings: AdaptSettings) -> dict[str, nn.Parameter]:
    """Weight and bias of the fused head's first layer, in eval mode: the nearest to READ's q, k, v of its fusion."""
    model.eval()
    linear = isinstance(model.fused_head, nn.Linear)
    first, prefix = (model.fused_head, "fused_head") if linear else (model.fused_head[0], "fused_head.0")
    return dict(first.named_parameters(prefix=prefix))


def _tails_and_heads(model: MultiModalModel, settings: AdaptSettings) -> dict[str, nn.Parameter]:
    """What trains of the tails, and all heads, in train mode; live trunks stay as they are evaluated."""
    model.train()
    model.trunks.eval()
    if not settings.dropout:
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.eval()
    tails = {f"tails.{name}.{key}": value for name, theta in model.theta().items() for key, value in theta.items()}
    return tails | {k: v for k, v in model.named_parameters() if k.startswith(("heads.", "fused_head."))}


@dataclass(frozen=True, slots=True)
class AdaptationRule:
    """How one rule adapts.

    Attributes:
        loss: (fused [B, C], modality -> uni-modal [B, C], settings) -> scalar.
        moved: sets the modes of a model's parts for all passes; name -> parameter that moves.
        lr, weight_decay: of Adam, where the settings name none.
        moment: which prediction its authors report.
    """

    loss: Callable[[torch.Tensor, Mapping[str, torch.Tensor], AdaptSettings], torch.Tensor]
    moved: Callable[[MultiModalModel, AdaptSettings], dict[str, nn.Parameter]]
    lr: float
    weight_decay: float
    moment: Moment


RULES = {
    "tent": AdaptationRule(tent_loss, _normalisation, 1e-4, 0.0, "before"),
    "read": AdaptationRule(read_loss, _first_of_fusion, 1e-4, 0.0, "after"),
    "aeo": AdaptationRule(aeo_loss, _tails_and_heads, 2e-5, 1e-4, "before"),
}
