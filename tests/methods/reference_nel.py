"""NEL from its formulas, the spectrum from the D x D matrix."""

from __future__ import annotations

import torch
from reference_simmmdg import SimMMDGReference, supcon, unit


def mean_shift(z, neighbours):
    rows = []
    for i in range(len(z)):
        others = sorted((j for j in range(len(z)) if j != i), key=lambda j: -float((z[i] @ z[j]).detach()))
        nearest = others[:neighbours]
        rows.append(0.5 * z[i] + 0.5 * sum(z[j] for j in nearest) / len(nearest))
    return unit(torch.stack(rows))


def agreement(shifted, temperature):
    q = unit(torch.cat(shifted, dim=1))
    first, second = [q[i] for i in range(0, len(q), 2)], [q[i] for i in range(1, len(q), 2)]
    total = 0
    for i, anchor in enumerate(first):
        likeness = torch.stack([anchor @ other / temperature for other in second])
        total = total + torch.log(torch.exp(likeness).sum()) - likeness[i]
    return total / len(first)


def flatness(e):
    spectrum = torch.linalg.eigvalsh(e.T @ e / len(e))
    spectrum = spectrum[spectrum > 1e-6]
    p = spectrum / spectrum.sum()
    return (p * torch.log(p + 1e-10)).sum()


class NELReference(SimMMDGReference):
    def loss(self, s):
        o, terms = self.settings, self.erm(s)
        weight = 1 - o.agreement if o.contrast is None else o.contrast
        z = [self.project(h[:, : h.shape[1] // 2], n) for h, n in zip(s.h, self.names, strict=True)]
        shifted = [mean_shift(one, o.neighbours) for one in z]
        return {
            "ce_fused": (terms["ce_fused"][0], o.scale),
            "ce": terms["ce"],
            "agreement": (agreement(shifted, o.agreement_temperature), o.scale * o.agreement),
            "contrast": (supcon(z, s.labels, o.temperature), o.scale * weight),
            "flatness": (flatness(torch.cat(s.h, dim=1)), o.scale * o.flatness),
        }
