"""Gradient-Blending from its formulas: every branch trained alone, one after the other, from the first weights."""

from __future__ import annotations

import copy

import torch
from plain import Plain


class BlendingReference(Plain):
    def loss(self, s):
        terms, held = self.erm(s), self.buffers
        weights = held["method.of_modality"]
        return {"ce_fused": (terms["ce_fused"][0], held["method.of_fused"]), "ce": (terms["ce"][0], weights)}

    def branch_loss(self, branch, batch):
        h = [self.normalised(self.pooled(k, batch.inputs[n][0])) for k, n in enumerate(self.names)]
        logits = self.fused(h) if branch is None else self.head(h[branch], f"student.heads.{self.names[branch]}")
        return self.ce(logits, batch.labels)

    def mean(self, branch, batches):
        with torch.no_grad():
            values = [(len(b.labels), float(self.branch_loss(branch, b))) for b in batches]
        return sum(n * v for n, v in values) / sum(n for n, _ in values)

    def trained_alone(self, branch, batches):
        """A copy of this student, of which one branch took an Adam step for each batch."""
        other = copy.deepcopy(self)
        for time, batch in enumerate(batches, 1):
            keys = list(other.values)
            found = torch.autograd.grad(
                other.branch_loss(branch, batch), list(other.values.values()), allow_unused=True
            )
            with torch.no_grad():
                for key, gradient in zip(keys, found, strict=True):
                    if gradient is None:
                        continue
                    g, (m, v) = gradient + 1e-2 * other.values[key], other.moments[key]
                    m.copy_(0.9 * m + 0.1 * g)
                    v.copy_(0.999 * v + 0.001 * g * g)
                    step = (m / (1 - 0.9**time)) / (torch.sqrt(v / (1 - 0.999**time)) + 1e-8)
                    other.values[key] -= 1e-2 * step
        return other


def weights_of(reference, training, validation, epochs):
    """(w_fused, w_1, ..., w_M): `training(epoch)` gives batches."""
    found = []
    for branch in (None, *range(len(reference.names))):
        after = reference.trained_alone(branch, [b for e in range(epochs) for b in training(e)])
        (t0, v0), (t1, v1) = ((r.mean(branch, training(0)), r.mean(branch, validation)) for r in (reference, after))
        found.append(abs(v0 - v1) / ((v1 - t1) - (v0 - t0)) ** 2)
    return [one / sum(found) for one in found]
