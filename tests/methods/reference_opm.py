"""OPM from its formulas."""

from __future__ import annotations

import math

import torch
from plain import Plain


class OPMReference(Plain):
    def loss(self, s):
        o, count = self.settings, len(self.names)
        score = [
            sum(float(self.probabilities(logits)[i, int(y)].detach()) for i, y in enumerate(s.labels))
            for logits in self.alone(s)
        ]
        rho = [sum(score[k] / score[j] for j in range(count) if j != k) / max(count - 1, 1) for k in range(count)]
        coin, uniform = s.draws.pop(0).item(), s.draws.pop(0)
        active = coin < o.probability and self.epoch >= o.start
        q = [
            min(max(o.rate * (1 + o.strength * math.tanh(r - 1)), 0), 1) if active and count > 1 and r > 1 else 0.0
            for r in rho
        ]
        widths = [h.shape[1] for h in s.h]
        theta = sum(d * one for d, one in zip(widths, q, strict=True)) / sum(widths)
        rows, labels = [], []
        for i, label in enumerate(s.labels):
            kept = [uniform[i, k].item() >= q[k] for k in range(count)]
            if any(kept):
                rows.append(torch.cat([s.h[k][i] / (1 - theta) if kept[k] else 0 * s.h[k][i] for k in range(count)]))
                labels.append(label)
        self.removed = len(s.labels) - len(rows)
        zero = 0 * s.fused.sum()
        ce = self.ce(self.head(torch.stack(rows), "student.fused_head"), labels) if rows else zero
        q_tensor = torch.tensor(q, dtype=torch.float64)
        return {**self.erm(s), "ce_fused": (ce, 1.0), "q": (q_tensor, 0.0)}
