"""ADMMDG from its formulas: pair by pair, and gradients as one long vector for each objective, with branches."""

from __future__ import annotations

import torch
from reference_jat import JATReference, reversed_
from reference_simmmdg import dist, unit


def wsup(z, labels, groups, logits, positives, temperature):
    """Rows z, a label and a group of each; logits: function of two rows' numbers; positives: whether two rows are."""
    total, anchors = 0, 0
    for a in range(len(z)):
        others = [c for c in range(len(z)) if c != a]
        chosen = [b for b in others if labels[a] == labels[b] and positives(a, b)]
        if not chosen:
            continue
        anchors += 1
        logs = torch.log(sum(torch.exp(z[a] @ z[c] / temperature) for c in others))
        e = [torch.exp(logits(a, b)) for b in chosen]
        for weight, b in zip(e, chosen, strict=True):
            total = total + weight / sum(e) * (z[a] @ z[b] / temperature - logs)
    return -(temperature / 0.07) * total / max(anchors, 1)


def surgery(vectors, orders):
    """The projected gradients, each along the others as they were; vectors [T, n]."""
    projected, removed = [], 0
    for i, order in enumerate(orders):
        g = vectors[i].clone()
        for j in order:
            dot = float(g @ vectors[j])
            if dot < 0:
                removed += 1
                g = g - dot / max(float(vectors[j] @ vectors[j]), 1e-12) * vectors[j]
        projected.append(g)
    return projected, removed


class ADMMDGReference(JATReference):
    conflicts = 0

    def project(self, x, prefix):
        for first in (0, 3):
            x = torch.relu(self.batch_norm(self.affine(x, f"{prefix}.{first}"), f"{prefix}.{first + 1}"))
        return unit(self.affine(x, f"{prefix}.6"))

    def loss(self, s):
        o, terms = self.settings, self.erm(s)
        count, clips = len(self.names), len(s.labels)
        first = [
            self.project(h[:, : h.shape[1] // 2], f"method.shared.{n}") for h, n in zip(s.h, self.names, strict=True)
        ]
        second = [
            self.project(h[:, h.shape[1] // 2 : h.shape[1] // 2 * 2], f"method.specific.{n}")
            for h, n in zip(s.h, self.names, strict=True)
        ]
        labels = [int(y) for _ in range(count) for y in s.labels]
        told = len(set(s.domains.tolist())) if "method.pairs_within" not in self.values else 2
        domains = [[4, 2].index(int(d)) if told > 1 else 0 for _ in range(count) for d in s.domains]
        modality = [k for k in range(count) for _ in range(clips)]
        across = reversed_(self.values.get("method.pairs_across", torch.zeros(count, told, count, told).double()), 1.0)
        within = reversed_(self.values.get("method.pairs_within", torch.zeros(count, told, told).double()), 1.0)

        def of_all(a, b):
            one = across[modality[a], domains[a], modality[b], domains[b]]
            return (one + across[modality[b], domains[b], modality[a], domains[a]]) / 2

        def of_one(a, b):
            table = within[modality[a]]
            return (table[domains[a], domains[b]] + table[domains[b], domains[a]]) / 2

        def same(a, b):
            return modality[a] == modality[b]

        t = o.temperature
        terms["across"] = (wsup(torch.cat(first), labels, None, of_all, lambda a, b: True, t), o.across)
        terms["within"] = (wsup(torch.cat(second), labels, None, of_one, same, t), o.within)
        terms["separation"] = (dist(s.h), o.separation)
        self.terms = terms
        return terms

    def changed(self, gradients, s):
        objectives = [("ce_fused", "ce"), ("across",), ("within",), ("separation",)]
        keys, found, reached = list(self.values), [], {}
        for number, names in enumerate(objectives):
            total = sum((self.terms[n][1] * self.terms[n][0]).sum() for n in names)
            each = torch.autograd.grad(total, list(self.values.values()), retain_graph=True, allow_unused=True)
            for key, g in zip(keys, each, strict=True):
                if g is not None:
                    reached.setdefault(key, set()).add(number)
            found.append(
                torch.cat(
                    [
                        (torch.zeros_like(self.values[k]) if g is None else g).flatten()
                        for k, g in zip(keys, each, strict=True)
                    ]
                )
            )
        uniform = s.draws.pop(0).tolist()
        orders = [sorted(range(4), key=lambda j, row=row: row[j]) for row in uniform]
        projected, removed = surgery(torch.stack(found), orders)
        self.conflicts += removed
        whole, result, at = torch.stack(projected).sum(dim=0), {}, 0
        for key, value in self.values.items():
            part = whole[at : at + value.numel()].view_as(value)
            at += value.numel()
            result[key] = part / 4 if len(reached[key]) == 4 else part
        return result
