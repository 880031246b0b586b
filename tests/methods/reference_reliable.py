"""MBCD that forces no broken branch: what its variants change in the plainly written step of MBCD."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from reference_arl import pushed

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from reference import ReferenceStep, log_softmax, softmax


def ratios(q):
    """The best of the others over each."""
    if len(q) == 1:
        return [1.0]
    return [max(q[:k] + q[k + 1 :]) / q[k] for k in range(len(q))]


def probe(rows, labels, others, classes):
    """Logits of other rows by the regularised logistic regression of these, by torch."""
    mean, spread = rows.mean(dim=0), rows.std(dim=0, correction=0)

    def scaled(values):
        return torch.cat([(values - mean) / torch.where(spread > 0, spread, 1.0), values.new_ones(len(values), 1)], 1)

    x, weights = scaled(rows), torch.zeros(classes, rows.shape[1] + 1).double().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-9, tolerance_change=0, history_size=30)

    def closure():
        optimizer.zero_grad()
        loss = (weights**2).sum() / 2 - sum(log_softmax(x @ weights.T)[i, y] for i, y in enumerate(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    return scaled(others) @ weights.detach().T


class ReliableReference(ReferenceStep):
    """`domains` are those of the batch, `sources` the training's; `nll` what the last look at the test split found."""

    nll, domains = None, None

    def begin(self, classes, sources):
        self.classes, self.sources = classes, sources
        self.probed = self.settings.reliability.by == "left_out" and len(sources) > 1

    def look(self, clips):
        """nll from (inputs, labels, domains) of the test split."""
        found = []
        for k, n in enumerate(self.names):
            rows, labels, domains = [], [], []
            for inputs, y, of in clips:
                h = self.feature(k, inputs[n], self.values, self.buffers, training=False)
                rows.append((h if self.probed else self.head(h, f"heads.{n}", self.values, False)).detach())
                labels += y.tolist()
                domains += of.tolist()
            rows, labels, domains = torch.cat(rows), torch.tensor(labels), torch.tensor(domains)
            by_source = []
            for source in self.sources:
                own = domains == source
                logits = probe(rows[~own], labels[~own], rows[own], self.classes) if self.probed else rows[own]
                told = log_softmax(logits)
                by_source.append(-sum(float(told[i, y]) for i, y in enumerate(labels[own])) / int(own.sum()))
            found.append(sum(by_source) / len(by_source))
        self.nll = found

    def spared(self, p, first, uni, labels):
        o = self.settings.reliability
        if o.by == "none":
            return super().spared(p, first, uni, labels)
        if o.by == "arl":
            zero = [torch.zeros_like(h) for h in first]
            alone = [
                self.head(torch.cat([h if j == k else zero[j] for j, h in enumerate(first)], dim=1), "fused_head",
                          self.values, False).detach()
                for k in range(len(first))
            ]  # fmt: skip
            self.q = pushed(alone, softmax, 4.0)[2]
        else:
            self.q = [1 / max(one, 1e-3) for one in self.nll]
        rest = ratios(self.q)
        spared = [one * min(1.0, ratio) ** o.power for one, ratio in zip(p, rest, strict=True)]
        return spared, [min(1.0, 1 / ratio) ** o.power for ratio in rest]

    def kept(self, keep, uni, labels):
        if not self.settings.dropout.agreement:
            return keep
        keep = keep.clone()
        for i, y in enumerate(labels):
            if not any(keep[i, k] and int(uni[k][i].argmax()) == int(y) for k in range(len(uni))):
                keep[i] = 1.0
        return keep

    def own(self, first, uni, labels, draws):
        terms, size = {}, len(labels)
        if self.settings.conflict.weight:
            orders = [list(range(size))]
            for _ in self.names[1:]:
                uniform = draws.pop(0).tolist()
                orders.append(sorted(range(size), key=uniform.__getitem__))
            value = 0
            for i in range(size):
                strange = torch.cat([h[order[i]].detach() for h, order in zip(first, orders, strict=True)])
                said = sum(log_softmax(z[o[i]][None].detach())[0] for z, o in zip(uni, orders, strict=True))
                target = softmax(said[None])[0]
                rows = log_softmax(self.head(strange[None], "fused_head", self.values, True))[0]
                value = value + sum(t * (math.log(t) - row) for t, row in zip(target, rows, strict=True))
            terms["conflict"] = (value / size, self.settings.conflict.weight)
        return terms
