"""MMPareto from its formulas, encoder by encoder, with branches; the least norm by search along the segment."""

from __future__ import annotations

import torch
from plain import Plain


class MMParetoReference(Plain):
    conflicts = 0

    def loss(self, s):
        self.terms = self.erm(s)
        return self.terms

    def changed(self, gradients, s):
        values, result = self.values, dict(gradients)
        for k, name in enumerate(self.names):
            tail = [n for n in values if n.startswith(f"student.tails.{name}.")]

            def of(scalar, tail=tail):
                keys = [values[n] for n in tail]
                found = torch.autograd.grad(scalar, keys, retain_graph=True, allow_unused=True)
                return [torch.zeros_like(v) if g is None else g for v, g in zip(keys, found, strict=True)]

            m, u = of(self.terms["ce_fused"][0]), of(self.terms["ce"][0][k])
            x, y = (torch.cat([g.flatten() for g in one]) for one in (m, u))
            a = 0.5
            if float(x @ y) < 0:
                self.conflicts += 1
                # ||a m + (1 - a) u||^2 is a parabola in a: its lowest point from three of its values.
                at = [float(((t * x + (1 - t) * y) ** 2).sum()) for t in (0.0, 0.5, 1.0)]
                curve, slope = 2 * (at[0] - 2 * at[1] + at[2]), -3 * at[0] + 4 * at[1] - at[2]
                a = -slope / (2 * curve)
            for n, g, h in zip(tail, m, u, strict=True):
                mixed = 2 * a * g + 2 * (1 - a) * h
                result[n] = mixed * max(1.0, float((g + h).norm() / mixed.norm()))
        return self.modulated(result, [self.settings.gamma] * len(self.names))
