"""CMRF from its formulas, with the teacher's own pass."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace

import torch
from plain import Plain
from reference_simmmdg import SimMMDGReference, supcon, unit
from scipy.stats import beta as beta_distribution


def apart(student, own, other, kept):
    mixed = torch.stack([kept[i] * own[i] + (1 - kept[i]) * other[i] for i in range(len(own))])
    return torch.sqrt(((unit(mixed) - student) ** 2).sum(dim=1)).mean()


class CMRFReference(Plain):
    def __init__(self, training, settings):
        super().__init__(training, settings)
        for held in (self.buffers, self.teacher_buffers):
            for name in [n for n in held if "teacher_projections" in n or n.endswith(("modality_weights", "mixing"))]:
                del held[name]
        own = training.step.method.named_parameters()
        self.frozen = {f"method.{n}": v.detach().clone() for n, v in own if not v.requires_grad}
        if settings.method.simmmdg:
            self.halves = copy(self)
            self.halves.__class__, self.halves.own = SimMMDGReference, "method.simmmdg"
            weights = {"translation": 0.1, "contrast": 3.0, "distance": 0.7}
            weights = {name: settings.method.simmmdg * weight for name, weight in weights.items()}
            self.halves.settings = SimpleNamespace(**weights, temperature=settings.method.temperature)

    def project(self, x, name, values=None, buffers=None):
        prefix, training = f"method.projections.{name}", values is None
        held = {**self.frozen, **(values or self.values)}
        for first in (0, 3):
            x = self.affine(x, f"{prefix}.{first}", held)
            x = torch.relu(self.batch_norm(x, f"{prefix}.{first + 1}", training, held, buffers))
        return unit(self.affine(x, f"{prefix}.6", held))

    def loss(self, s):
        o, names = self.settings, self.names
        importance = [0.5 if n == "audio" else 1.0 for n in names]
        z = [self.project(h, n) for h, n in zip(s.h, names, strict=True)]
        with torch.no_grad():
            seen = [self.normalised(self.pooled(k, s.inputs[n][0], self.teacher)) for k, n in enumerate(names)]
            bar = [self.project(h, n, self.teacher, self.teacher_buffers) for h, n in zip(seen, names, strict=True)]
        uniform = s.draws.pop(0) if len(names) > 1 else None
        each, pair = [], 0
        for k in range(len(names)):
            total = 0 * z[k].sum()
            for j in [j for j in range(len(names)) if j != k]:
                # The distribution is tabulated at the middles of 4096 equal shares.
                share = (torch.floor(uniform[:, pair] * 4096) + 0.5) / 4096
                b = torch.from_numpy(beta_distribution.ppf(0.5 + share.numpy() / 2, o.beta, o.beta))
                total = total + apart(z[k], bar[k], bar[j], b)
                pair += 1
            each.append(total)
        terms = self.erm(s)
        weights = torch.tensor(importance, dtype=torch.float64)
        gate = 1.0 if self.time > self.average.start else 0.0
        halves = self.halves.loss(s) if o.simmmdg else {}
        if halves:
            halves = {n: halves[n] for n in ("translation", "distance")} | {"contrast_halves": halves["contrast"]}
        return halves | {
            "ce_fused": terms["ce_fused"],
            "ce": (terms["ce"][0], o.unimodal_weight * weights),
            "contrast": (supcon(z, s.labels, o.temperature), o.contrast),
            "distillation": (torch.stack(each), o.distillation * gate * weights),
        }
