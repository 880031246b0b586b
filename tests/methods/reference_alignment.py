"""CORAL, MMD and DANN from their formulas, domain by domain."""

from __future__ import annotations

import math

import torch
from plain import Plain, Scaled
from torch.nn import functional as F

LIST = [4, 2]


def by_domain(h, domains):
    return [h[[i for i, d in enumerate(domains) if int(d) == one]] for one in LIST]


def mean_of_pairs(found):
    return sum(found) / len(found) if found else torch.zeros((), dtype=torch.float64)


def coral(h, domains):
    groups = by_domain(h, domains)
    first, second = [], []
    for a in range(len(groups)):
        for b in range(a + 1, len(groups)):
            x, y = groups[a], groups[b]
            if len(x) and len(y):
                first.append(((x.mean(dim=0) - y.mean(dim=0)) ** 2).mean())
            if len(x) > 1 and len(y) > 1:
                cov = [(z - z.mean(dim=0)).T @ (z - z.mean(dim=0)) / (len(z) - 1) for z in (x, y)]
                second.append(((cov[0] - cov[1]) ** 2).mean())
    return mean_of_pairs(first) + mean_of_pairs(second) + 0 * h.sum()


def mmd(h, domains, gammas):
    def mean_kernel(x, y):
        total = 0
        for a in x:
            for b in y:
                total = total + sum(torch.exp(-g * ((a - b) ** 2).sum()) for g in gammas)
        return total / (len(x) * len(y))

    groups, found = by_domain(h, domains), []
    for a in range(len(groups)):
        for b in range(a + 1, len(groups)):
            x, y = groups[a], groups[b]
            if len(x) and len(y):
                found.append(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    return mean_of_pairs(found) + 0 * h.sum()


class AlignmentReference(Plain):
    def distance(self, h, domains):
        raise NotImplementedError

    def loss(self, s):
        o, terms = self.settings, self.erm(s)
        if o.on != "unimodal":
            terms["distance_fused"] = (self.distance(torch.cat(s.h, dim=1), s.domains), o.weight)
        if o.on != "fused":
            terms["distance"] = (torch.stack([self.distance(h, s.domains) for h in s.h]), o.weight / len(s.h))
        return terms


class CORALReference(AlignmentReference):
    def distance(self, h, domains):
        return coral(h, domains)


class MMDReference(AlignmentReference):
    def distance(self, h, domains):
        return mmd(h, domains, self.settings.gammas)


class DANNReference(Plain):
    def judge(self, h, which, name):
        prefix = f"method.{which}"
        x = F.dropout(torch.relu(self.affine(h, f"{prefix}.projections.{name}.0")), 0.5)
        x = self.affine(x, f"{prefix}.discriminator.0")
        x = torch.relu(self.batch_norm(x, f"{prefix}.discriminator.1"))
        return self.affine(x, f"{prefix}.discriminator.3")

    def loss(self, s):
        o, terms = self.settings, self.erm(s)
        grown = 1.0
        if o.ramp:
            grown = 2 / (1 + math.exp(-10 * min(self.time / o.ramp, 1.0))) - 1
        domains = [LIST.index(int(d)) for d in s.domains]
        h = [Scaled.apply(h, -o.reversal * grown) for h in s.h]
        if o.on != "unimodal":
            judged = self.judge(torch.cat(h, dim=1), "fused", "fused")
            terms["domain_fused"] = (self.ce(judged, domains), o.weight)
        if o.on != "fused":
            each = [self.ce(self.judge(x, "unimodal", n), domains) for x, n in zip(h, self.names, strict=True)]
            terms["domain"] = (torch.stack(each), o.weight / len(h))
        return terms
