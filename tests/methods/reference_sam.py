"""SAM from its formula: the whole loss written out at both points."""

from __future__ import annotations

import torch
from plain import Plain


class SAMReference(Plain):
    def at(self, s):
        h = [self.normalised(self.pooled(k, s.inputs[n][0])) for k, n in enumerate(self.names)]
        seen = h if self.joint else [x.detach() for x in h]
        s.unimodal = [self.head(x, f"student.heads.{n}") for x, n in zip(seen, self.names, strict=True)]
        s.fused = self.fused(h)
        return sum((weight * value).sum() for value, weight in self.erm(s).values())

    def loss(self, s):
        terms = self.erm(s)
        self.first = sum((weight * value).sum() for value, weight in terms.values())
        return terms

    def changed(self, gradients, s):
        moved = [n for n in gradients if self.joint or not n.startswith("student.heads.")]
        norm = torch.sqrt(sum((gradients[n] ** 2).sum() for n in moved))
        before = {n: self.values[n].detach().clone() for n in moved}
        with torch.no_grad():
            for n in moved:
                self.values[n] += self.settings.rho * gradients[n] / norm
        up = self.at(s)
        keys = list(gradients)
        found = torch.autograd.grad(up, [self.values[n] for n in keys])
        with torch.no_grad():
            for n, value in before.items():
                self.values[n].copy_(value)
        self.sharpness = (up - self.first).detach()
        return dict(zip(keys, found, strict=True))

    def step(self, batch, draws):
        return {**super().step(batch, draws), "sharpness": self.sharpness}
