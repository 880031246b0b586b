"""What several methods are made of.

Letters: B clips, M modalities, C classes, D_k features of modality k,
S source domains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import permutations
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from mbcd_cli.errors import SettingsError
from mbcd_cli.layers import product
from mbcd_cli.model import MultiModalModel
from mbcd_cli.naming import did_you_mean
from mbcd_cli.processes import Group
from mbcd_cli.settings import MethodSettings

TEACHER_FLOOR = 1e-12
"""Teacher probabilities are clamped from below here, as in the reference."""
BASE_TEMPERATURE = 0.07
"""What the supervised contrast's loss is scaled to."""


class ModulatedSettings(MethodSettings):
    """Of a method that multiplies what an encoder takes of a step."""

    modulate: Literal["gradient", "update"] = "gradient"
    """What the factors multiply: the encoder's gradient (the paper; Adam all but undoes that), or its update."""


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """Half-precision tensors, [*], as float32 (losses and statistics need the range), others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the batch: logits [B, C], labels [B] -> []."""
    logits = full_precision(logits)
    # Not torch's own: it rounds otherwise below vmap, and imports sympy there (2 s of a population's start).
    return (-logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]).sum() / len(labels)


def teacher_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """p_EMA: softmax of the teacher's fused logits, clamped at 1e-12; [B, C] -> [B, C]."""
    return full_precision(logits).softmax(dim=1).clamp(min=TEACHER_FLOOR)


def distillation(teacher: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(p_EMA || p) = sum_c p_EMA (log p_EMA - log p), averaged over the batch (Eq. 8); -> [].

    Args:
        teacher: p_EMA [B, C].
        logits: the student's logits [B, C] that give p.
    """
    # F.kl_div's own formula: that one has no rule for vmap.
    log_probabilities = full_precision(logits).log_softmax(dim=1)
    return (torch.xlogy(teacher, teacher) - teacher * log_probabilities).sum() / len(teacher)


def mean_entropies(logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """E[-sum_c p_c log p_c] of M times logits [B, C] -> M times []."""
    logs = [full_precision(of_modality).log_softmax(dim=1) for of_modality in logits]
    return [-(log.exp() * log).sum(dim=1).mean() for log in logs]


def logits_of_some(
    model: MultiModalModel, features: Mapping[str, torch.Tensor], sets: Sequence[Collection[int]]
) -> list[torch.Tensor]:
    """For each set of modalities: fused logits [B, C] where the features [B, D_k] of all others are 0; no dropout."""
    logits = []
    model.fused_head.eval()
    for some in sets:
        present = {n: h if k in some else torch.zeros_like(h) for k, (n, h) in enumerate(features.items())}
        logits.append(full_precision(model.fuse(present)))
    model.fused_head.train()
    return logits


def keep_at_least_one(uniform: torch.Tensor, rate: float) -> torch.Tensor:
    """Each modality of a clip kept with probability 1 - rate, and one of them at random where none is, [B, M].

    Args:
        uniform: draws from [0, 1), [B, M].
    """
    keep = uniform >= rate
    # The largest of M alike draws is any of them with equal probability, whatever the rate.
    return (keep | (~keep.any(dim=1, keepdim=True) & (uniform == uniform.amax(dim=1, keepdim=True)))).to(uniform.dtype)


def known_modalities(setting: str, names: Iterable[str], trained: Iterable[str]) -> None:
    """Refuse a setting that names a modality which there is not.

    Raises:
        SettingsError: one is neither trained nor one of the papers' three, which defaults name.
    """
    known = [*trained, "video", "audio", "flow"]
    for name in names:
        if name not in known:
            raise SettingsError(
                f"{setting} names {name}, which is no modality here.",
                f"{did_you_mean(name, known)}There are {', '.join(dict.fromkeys(known))}.",
            )


def need_domains(method: str, sources: int) -> None:
    """Refuse a method that compares source domains where there is one.

    Raises:
        SettingsError: there is one.
    """
    if sources < 2:
        raise SettingsError(
            f"Method {method} compares source domains, and there is one.",
            "Name several with training.source_domains, or train erm.",
        )


def modulation(ratio: torch.Tensor, alpha: float) -> torch.Tensor:
    """1 - tanh(alpha ratio) where the ratio is over 1, else 1; any shape. Not continuous at 1 (OGM-GE, GMP)."""
    return torch.where(ratio > 1, 1 - torch.tanh(alpha * ratio), 1.0)


def projection(inside: int, *, hidden: int, norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    """P: three linear layers with a norm between, [B, inside] -> [B, 128]."""
    return nn.Sequential(
        nn.Linear(inside, hidden),
        norm(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden),
        norm(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, 128),
    )


def shared_projections(dims: Mapping[str, int], *, hidden: int, method: str) -> nn.ModuleDict:
    """P_k of the shared half of every feature, [B, floor(D_k / 2)] -> [B, 128].

    Raises:
        SettingsError: a feature of a single number has no halves.
    """
    narrow = [name for name, dim in dims.items() if dim < 2]
    if narrow:
        raise SettingsError(
            f"Method {method} splits features into halves, and {', '.join(narrow)} has a single one.",
            "Give it an encoder with more features, or leave it out of model.modalities.",
        )
    return nn.ModuleDict({name: projection(dim // 2, hidden=hidden) for name, dim in dims.items()})


def shared_rows(projections: nn.ModuleDict, features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """z_k = hat(P_k(shared half of h_k)): M times unit rows [B, 128]."""
    shared = [half for half, _ in halves(features)]
    return [unit_rows(projections[name](half)) for name, half in zip(features, shared, strict=True)]


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """hat(u) = u / ||u||_2 per row: [B, D] -> [B, D], in float32 at least."""
    return F.normalize(full_precision(x), dim=1)


def supervised_contrast(
    rows: Sequence[torch.Tensor], labels: torch.Tensor, *, temperature: float, group: Group
) -> torch.Tensor:
    """Supervised contrast of the M views of each clip of the global batch (Khosla et al., 2020), [].

    All n = M B rows are anchors and contrasts, s_ab = z_a . z_b / temperature; the positives of a are the other rows of
    its label, a clip's other modalities among them:
    -(temperature / 0.07) mean_a mean_{b positive} [s_ab - log sum_{c != a} exp s_ac]; an anchor without any is 0.

    Args:
        rows: M times unit rows [B, D]. labels: [B].
    """
    z = torch.cat([group.gather(view) for view in rows])
    y = group.gather(labels).repeat(len(rows))
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = product(z, z.T) / temperature
    # A large negative number rather than -inf: a lone row has no contrast at all.
    log_probability = similarity - similarity.masked_fill(itself, -1e9).logsumexp(dim=1, keepdim=True)
    positive = ((y[:, None] == y[None, :]) & ~itself).to(z.dtype)
    mean = (positive * log_probability).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return -(mean.mean() * temperature) / BASE_TEMPERATURE


class Translators(nn.Module):
    """T_{j->k}: Linear(D_j, hidden), ReLU, Linear, ReLU, Dropout 0.5, Linear(hidden, D_k), for each ordered pair."""

    def __init__(self, dims: Mapping[str, int], *, hidden: int) -> None:
        super().__init__()
        self.pairs = list(permutations(dims, 2))
        self.layers = nn.ModuleDict(
            {
                f"{j}:{k}": nn.Sequential(
                    nn.Linear(dims[j], hidden),
                    nn.ReLU(inplace=True),
                    nn.Linear(hidden, hidden),
                    nn.ReLU(inplace=True),
                    nn.Dropout(0.5),
                    nn.Linear(hidden, dims[k]),
                )
                for j, k in self.pairs
            }
        )

    def forward(self, sources: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Features [B, D_j] -> (k, T_{j->k} of them [B, D_k]) of every ordered pair."""
        return [(k, self.layers[f"{j}:{k}"](sources[j])) for j, k in self.pairs]


def translation(translated: Sequence[tuple[str, torch.Tensor]], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the pairs of E ||hat(T_{j->k}) - hat(h_k)||_2 (not squared, targets not detached), []; 0 for M = 1."""
    apart = [row_distance(unit_rows(source), unit_rows(targets[k])) for k, source in translated]
    return torch.stack(apart).mean() if apart else full_precision(next(iter(targets.values()))).sum() * 0


def row_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """E ||a - b||_2 over rows: [B, D], [B, D] -> []."""
    return (a - b).norm(dim=1).mean()


def halves(features: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The shared half of each feature [B, D_k] (its first floor(D_k / 2) columns) and the specific one, as wide."""
    return [(h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 : h.shape[1] // 2 * 2]) for h in features.values()]


def halves_apart(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """- mean_k MSE(shared half, specific half), []: unbounded below, unless a norm bounds the features."""
    return -torch.stack([(full_precision(a) - full_precision(b)).square().mean() for a, b in halves(features)]).mean()


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, strength: float | torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.strength = inputs[1]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return -ctx.strength * gradient, None

    @staticmethod
    def vmap(info, in_dims, x: torch.Tensor, strength: float | torch.Tensor):
        x = x.movedim(in_dims[0], 0)
        if in_dims[1] is not None:
            strength = strength.reshape(-1, *([1] * (x.dim() - 1)))
        return _Reversed.apply(x, strength), 0


def reversed_gradient(x: torch.Tensor, strength: float) -> torch.Tensor:
    """R_b: x, [*], forward, its gradient times -b backward (Ganin and Lempitsky, 2015)."""
    return _Reversed.apply(x, strength)


class Adversary(nn.Module):
    """D(Q_k(R_b(h_k))): a projection of each modality, and one discriminator for all of them.

    Q_k = Linear(D_k, hidden), ReLU, Dropout 0.5.

    Args:
        dims: modality -> D_k.
        discriminator: D, which reads `hidden` features.
        strength: b.
    """

    def __init__(self, dims: Mapping[str, int], discriminator: nn.Module, *, hidden: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.projections = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(d, hidden), nn.ReLU(inplace=True), nn.Dropout(0.5)) for n, d in dims.items()}
        )
        self.discriminator = discriminator

    def forward(self, features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Features [B, D_k] -> logits of D of every modality, one call of D for each."""
        return [
            self.discriminator(self.projections[n](reversed_gradient(h, self.strength))) for n, h in features.items()
        ]


class DomainAdversary(Adversary):
    """An adversary whose discriminator tells S source domains apart, [B, S] of every modality.

    D = Linear(hidden, hidden / 2), BatchNorm, ReLU, Linear(hidden / 2, S).
    """

    def __init__(self, dims: Mapping[str, int], *, domains: int, hidden: int, strength: float) -> None:
        half = max(hidden // 2, 1)
        discriminator = nn.Sequential(
            nn.Linear(hidden, half), nn.BatchNorm1d(half), nn.ReLU(inplace=True), nn.Linear(half, domains)
        )
        super().__init__(dims, discriminator, hidden=hidden, strength=strength)


class FusedDomainAdversary(nn.Module):
    """G(R_b(h_1 (+) ... (+) h_M)): a discriminator of S source domains on the concatenated features.

    G = Linear(sum_k D_k, hidden), ReLU, Dropout 0.5, Linear(hidden, S).
    """

    def __init__(self, dims: Mapping[str, int], *, domains: int, hidden: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.discriminator = nn.Sequential(
            nn.Linear(sum(dims.values()), hidden), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(hidden, domains)
        )

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Features [B, D_k] -> domain logits [B, S]."""
        return self.discriminator(reversed_gradient(torch.cat(list(features.values()), dim=1), self.strength))
