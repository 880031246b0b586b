"""MIRO from its formula."""

from __future__ import annotations

import torch
from plain import Plain


class MIROReference(Plain):
    def __init__(self, training, settings):
        super().__init__(training, settings)
        self.oracle = {n: v.detach().clone() for n, v in self.values.items() if n.startswith("student.tails")}
        self.buffers = {n: v for n, v in self.buffers.items() if not n.startswith("method.oracle")}

    def decay(self, name):
        return 0.0 if name.startswith("method.raw") else super().decay(name)

    def loss(self, s):
        each = []
        for k, name in enumerate(self.names):
            first = self.pooled(k, s.inputs[name][0], self.oracle)
            b = self.settings.speed * self.values[f"method.raw.{name}"]
            variance = torch.log(1 + torch.exp(b)) + 1e-5
            rows = 0.5 * (torch.log(variance) + (s.pooled[k] - first) ** 2 / variance)
            each.append(rows.sum() / rows.numel())
        return {**self.erm(s), "information": (torch.stack(each), self.settings.weight)}
