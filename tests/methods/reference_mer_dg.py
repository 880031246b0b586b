"""MER-DG from its formulas: columns one by one, the whole matrix [D, D] and its determinant."""

from __future__ import annotations

import torch
from plain import Plain
from reference_simmmdg import supcon, unit


def marginal(z):
    total = 0
    for c in range(z.shape[1]):
        column = z[:, c]
        var = ((column - column.mean()) ** 2).sum() / (len(column) - 1)
        total = total + torch.relu(1 - torch.sqrt(var + 1e-4))
    return total / z.shape[1]


def spectral(z):
    columns = []
    for c in range(z.shape[1]):
        centred = z[:, c] - z[:, c].mean()
        columns.append(centred / (torch.sqrt((centred**2).mean()) + 1e-4))
    w = torch.stack(columns, dim=1)
    matrix = w.T @ w / (len(z) - 1) + 1e-4 * torch.eye(z.shape[1], dtype=z.dtype)
    return -torch.linalg.slogdet(matrix)[1] / z.shape[1]


class MERDGReference(Plain):
    def layer_norm(self, x, prefix):
        centred = x - x.mean(dim=1, keepdim=True)
        x = centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-5)
        return x * self.values[f"{prefix}.weight"] + self.values[f"{prefix}.bias"]

    def project(self, x, name):
        prefix = f"method.projections.{name}"
        for first in (0, 3):
            x = torch.relu(self.layer_norm(self.affine(x, f"{prefix}.{first}"), f"{prefix}.{first + 1}"))
        return self.affine(x, f"{prefix}.6")

    def loss(self, s):
        o, terms, z = self.settings, self.erm(s), s.pooled
        if o.on == "projection":
            z = [self.project(h, n) for h, n in zip(s.h, self.names, strict=True)]
        terms["marginal"] = (torch.stack([marginal(one) for one in z]), o.weight * o.marginal)
        terms["spectral"] = (torch.stack([spectral(one) for one in z]), o.weight * o.spectral)
        if o.contrast:
            terms["contrast"] = (supcon([unit(one) for one in z], s.labels, o.temperature), o.contrast)
        return terms
