"""MOOSA from its formulas."""

from __future__ import annotations

import torch
from reference_simmmdg import SimMMDGReference, dist, supcon


class MOOSAReference(SimMMDGReference):
    def loss(self, s):
        o, count = self.settings, len(self.names)
        uniform, first, hidden = s.draws.pop(0), 0, []
        for h in s.h:
            hidden.append(torch.where(uniform[:, first : first + h.shape[1]] < o.masked, 0.0, h))
            first += h.shape[1]
        trans = self.trans(s.h, hidden)
        z = [self.project(h[:, : h.shape[1] // 2], n) for h, n in zip(s.h, self.names, strict=True)]

        branches = [*s.unimodal, s.fused]
        p = [self.probabilities(logits) for logits in branches]
        entropies = [-(one * torch.log(one)).sum(dim=1) for one in p]
        rows = [self.ce_rows(logits, s.labels) for logits in branches]
        exponents = [torch.exp(-h / o.weighting_temperature) for h in entropies]
        weights = [e / sum(exponents) for e in exponents]
        if o.weighting == "clip":
            weighted = sum((w * ce).mean() for w, ce in zip(weights, rows, strict=True))
        else:
            weighted = sum(w.mean() * ce.mean() for w, ce in zip(weights, rows, strict=True))
        entropy = -sum((one * torch.log(one + 1e-5)).sum(dim=1).mean() for one in p) / len(p)

        # Cut, put in each order, classify the order. Orders are read off the first column of each of a row's parts.
        parts = o.parts or (4 if count <= 2 else 2)
        pieces = [h[:, i * w : (i + 1) * w] for h in s.h for w in [h.shape[1] // parts] for i in range(parts)]
        losses = []
        for number, order in enumerate(self.orders):
            x = torch.cat([pieces[i] for i in order], dim=1)
            logits = self.affine(torch.relu(self.affine(x, "method.puzzle.0")), "method.puzzle.2")
            losses.append(self.ce(logits, [number] * len(x)))
        erm = self.erm(s)
        return {
            "ce_fused": (erm["ce_fused"][0], 0.0),
            "ce": (erm["ce"][0], 0.0),
            "weighted_ce": (weighted, 1.0),
            "translation": (trans, o.translation),
            "contrast": (supcon(z, s.labels, o.temperature), o.contrast),
            "distance": (dist(s.h), o.distance),
            "entropy": (entropy, o.entropy),
            "jigsaw": (sum(losses) / len(losses), o.jigsaw),
        }

    def __init__(self, training, settings):
        super().__init__(training, settings)
        columns = self.buffers["method.columns"]
        count, dims = len(self.names), list(training.step.model.dims.values())
        parts = self.settings.parts or (4 if count <= 2 else 2)
        start = {sum(dims[:k]) + i * (d // parts): k * parts + i for k, d in enumerate(dims) for i in range(parts)}
        self.orders = []
        for row in columns.tolist():
            order, at = [], 0
            while at < len(row):
                piece = start[row[at]]
                order.append(piece)
                at += dims[piece // parts] // parts
            assert sorted(order) == list(range(count * parts))
            self.orders.append(order)
