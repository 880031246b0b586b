"""JAT from its formulas."""

from __future__ import annotations

import torch
from plain import Plain
from torch.nn import functional as F


def reversed_(x, strength):
    return -strength * x + (1 + strength) * x.detach()


class JATReference(Plain):
    def step(self, batch, draws):
        self.draws, self.removed = draws, 0
        return super().step(batch, draws)

    # ---- noise on feature statistics, on what enters the tail and on what is pooled

    def spread(self, x):
        mean = x.mean(dim=0)
        return torch.sqrt(((x - mean) ** 2).sum(dim=0) / (len(x) - 1) + 1e-6)

    def noised(self, x):
        coin = float(self.draws.pop(0) < self.settings.feature_noise.probability)
        if x.dim() == 2:
            return x + coin * self.draws.pop(0) * self.spread(x)
        flat = x.flatten(2)
        mean = flat.mean(dim=2, keepdim=True)
        std = torch.sqrt(((flat - mean) ** 2).sum(dim=2, keepdim=True) / (flat.shape[2] - 1) + 1e-6)
        noise_mean, noise_std = self.draws.pop(0)[:, :, None], self.draws.pop(0)[:, :, None]
        new_mean = mean + coin * noise_mean * self.spread(mean)
        new_std = std + coin * noise_std * self.spread(std)
        return ((flat - mean) / std * new_std + new_mean).reshape(x.shape)

    def pooled(self, k, x, values=None):
        if not self.settings.feature_noise.enabled:
            return super().pooled(k, x, values)
        values, prefix = values or self.values, f"student.tails.{self.names[k]}.layer.0"
        x = self.noised(x)
        if k != 1:
            return self.noised(torch.tanh(self.affine(x, prefix)))
        maps = F.conv2d(x, values[f"{prefix}.weight"], values[f"{prefix}.bias"])
        return self.noised(torch.tanh(maps)).mean(dim=(2, 3))

    # ---- modality dropout, before fusion only

    def fused(self, h):
        rate = self.settings.dropout
        if rate == 0:
            return super().fused(h)
        rows, uniform = [], self.draws.pop(0)
        for i, draws in enumerate(uniform.tolist()):
            kept = [u >= rate for u in draws]
            self.removed += len(kept) - sum(kept)
            if not any(kept):
                kept[draws.index(max(draws))] = True
            rows.append(torch.cat([h_k[i] * float(keep) for h_k, keep in zip(h, kept, strict=True)]))
        return super().fused([torch.stack(rows)])

    # ---- adversaries

    def projected(self, h, name, adversary, strength):
        prefix = f"method.{adversary}.projections.{name}.0"
        return F.dropout(torch.relu(self.affine(reversed_(h, strength), prefix)), 0.5)

    def loss(self, s):
        o, names, count = self.settings, self.names, len(self.names)
        several = len(set(self.sources)) > 1
        told = [
            self.projected(h, n, "modality_adversary", o.modality_reversal) for h, n in zip(s.h, names, strict=True)
        ]
        told = [self.affine(x, "method.modality_adversary.discriminator") for x in told]
        modality = torch.stack([self.ce(x, [k] * len(x)) for k, x in enumerate(told)])
        terms = {**self.erm(s), "modality": (modality, o.modality_weight / count)}
        entropies = None
        if several:
            domains, prefix = [self.sources.index(int(d)) for d in s.domains], "method.domain_adversary.discriminator"
            logits = []
            for h, n in zip(s.h, names, strict=True):
                x = self.affine(self.projected(h, n, "domain_adversary", o.domain_reversal), f"{prefix}.0")
                logits.append(self.affine(torch.relu(self.batch_norm(x, f"{prefix}.1")), f"{prefix}.3"))
            prefix = "method.fused_adversary.discriminator"
            x = torch.relu(self.affine(reversed_(torch.cat(s.h, dim=1), o.domain_reversal), f"{prefix}.0"))
            fused = self.affine(F.dropout(x, 0.5), f"{prefix}.3")
            terms["domain"] = (torch.stack([self.ce(x, domains) for x in logits]), o.domain_weight / count)
            terms["domain_fused"] = (self.ce(fused, domains), o.domain_weight)
            entropies = self.entropies(logits)
        elif o.single_source == "class":
            entropies = self.entropies(s.unimodal)
        whole = count if o.weights_sum == "modalities" else 1
        weights = torch.full((count,), whole / count, dtype=torch.float64)
        if entropies is not None and o.weighting == "domain":
            e = torch.exp(torch.stack(entropies) / o.temperature)
            weights = whole * e / e.sum()
        self.weights = weights.detach()
        return {**terms, "ce": (terms["ce"][0], o.unimodal_weight * weights), "w": (o.unimodal_weight * weights, 0.0)}

    def entropies(self, logits):
        p = [self.probabilities(x) for x in logits]
        return [-(x * torch.log(x)).sum() / len(x) for x in p]

    def __init__(self, training, settings):
        super().__init__(training, settings)
        self.sources = training.step.context.sources.tolist()
