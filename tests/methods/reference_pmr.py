"""PMR from its formulas: prototypes and distances clip by clip, class by class."""

from __future__ import annotations

import torch
from plain import Plain


def class_means(h, labels, classes):
    means = []
    for c in range(classes):
        rows = [row for row, y in zip(h, labels, strict=True) if y == c]
        means.append(sum(rows) / len(rows))
    return torch.stack(means)


def distances(h, prototypes):
    return torch.stack([torch.stack([((row - c) ** 2).sum().sqrt() for c in prototypes]) for row in h])


class PMRReference(Plain):
    def loss(self, s):
        o, terms = self.settings, self.erm(s)
        prototypes = [self.buffers[f"method.prototypes_{name}"] for name in self.names]
        similar = [-distances(h, c) for h, c in zip(s.h, prototypes, strict=True)]
        pace = []
        for one in similar:
            p = self.probabilities(one.detach())
            pace.append(sum(float(p[i, int(y)]) for i, y in enumerate(s.labels)))
        weights = [o.alpha if one < max(pace) and self.epoch < o.stop else 0.0 for one in pace]
        self.slower = sum(w > 0 for w in weights)
        ce = torch.stack([self.ce(one, s.labels) for one in similar])
        terms["prototype"] = (ce, torch.tensor(weights, dtype=torch.float64))
        return terms
