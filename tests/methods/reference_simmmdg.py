"""SimMMDG from its formulas: the blocks that MOOSA and CMRF use too."""

from __future__ import annotations

import torch
from plain import Plain
from torch.nn import functional as F


def unit(x):
    return x / torch.sqrt((x**2).sum(dim=1, keepdim=True))


def supcon(views, labels, temperature):
    z, y = [row for view in views for row in view], [int(label) for _ in views for label in labels]
    total = 0
    for a in range(len(z)):
        others = [c for c in range(len(z)) if c != a]
        logs = torch.log(sum(torch.exp(z[a] @ z[c] / temperature) for c in others))
        positive = [z[a] @ z[b] / temperature - logs for b in others if y[b] == y[a]]
        if positive:
            total = total + sum(positive) / len(positive)
    return -(temperature / 0.07) * total / len(z)


def dist(features):
    each = []
    for h in features:
        half = h.shape[1] // 2
        each.append(((h[:, :half] - h[:, half : 2 * half]) ** 2).sum() / (len(h) * half))
    return -sum(each) / len(each)


class SimMMDGReference(Plain):
    own = "method"

    def project(self, x, name):
        prefix = f"{self.own}.projections.{name}"
        for first in (0, 3):
            x = self.affine(x, f"{prefix}.{first}")
            x = torch.relu(self.batch_norm(x, f"{prefix}.{first + 1}"))
        return unit(self.affine(x, f"{prefix}.6"))

    def translate(self, x, j, k):
        prefix = f"{self.own}.translators.layers.{self.names[j]}:{self.names[k]}"
        x = torch.relu(self.affine(torch.relu(self.affine(x, f"{prefix}.0")), f"{prefix}.2"))
        return self.affine(F.dropout(x, 0.5), f"{prefix}.5")

    def trans(self, targets, sources):
        count, each = len(targets), []
        for j in range(count):
            for k in [k for k in range(count) if k != j]:
                apart = unit(self.translate(sources[j], j, k)) - unit(targets[k])
                each.append(torch.sqrt((apart**2).sum(dim=1)).mean())
        return sum(each) / len(each) if each else 0 * targets[0].sum()

    def loss(self, s):
        o = self.settings
        trans = self.trans(s.h, s.h)
        z = [self.project(h[:, : h.shape[1] // 2], n) for h, n in zip(s.h, self.names, strict=True)]
        return {
            **self.erm(s),
            "translation": (trans, o.translation),
            "contrast": (supcon(z, s.labels, o.temperature), o.contrast),
            "distance": (dist(s.h), o.distance),
        }
