"""GMP from its formulas, modality by modality, with branches."""

from __future__ import annotations

import math

import torch
from plain import Plain
from torch.nn import functional as F


class GMPReference(Plain):
    conflicts = 0

    def __init__(self, training, settings):
        super().__init__(training, settings)
        own = training.step.method.named_parameters()
        self.frozen = {f"method.{n}": v.detach().clone() for n, v in own if not v.requires_grad}

    def judge_all(self, h):
        held, prefix = {**self.values, **self.frozen}, "method.fused_adversary.discriminator"
        x = F.dropout(torch.relu(self.affine(torch.cat(h, dim=1), f"{prefix}.0", held)), 0.5)
        return self.affine(x, f"{prefix}.3", held)

    def judge(self, h, name):
        held, prefix = {**self.values, **self.frozen}, "method.adversary.discriminator"
        x = F.dropout(torch.relu(self.affine(h, f"method.adversary.projections.{name}.0", held)), 0.5)
        x = torch.relu(self.batch_norm(self.affine(x, f"{prefix}.0", held), f"{prefix}.1", values=held))
        return self.affine(x, f"{prefix}.3", held)

    def loss(self, s):
        self.seen, o = s, self.settings
        terms = self.erm(s)
        terms["ce"] = (terms["ce"][0], o.unimodal_weight)
        self.judged = self.judged_all = None
        if any(n.startswith("method.adversary") for n in {**self.values, **self.frozen}):
            domains = [[4, 2].index(int(d)) for d in s.domains]
            together = o.of == "fused"
            if together:
                self.judged_all = self.ce(self.judge_all(s.h), domains)
                terms["domain_fused"] = (self.judged_all, o.domain_weight)
            seen = [h.detach() for h in s.h] if together else s.h
            self.judged = [self.judge(h, n) for h, n in zip(seen, self.names, strict=True)]
            weight = 1.0 if together else o.domain_weight
            terms["domain"] = (torch.stack([self.ce(x, domains) for x in self.judged]), weight)
            self.domains = domains
        self.terms = terms
        return terms

    def ratio(self, logits, truth, over):
        sums = [
            sum(float(self.probabilities(x)[i, int(y)].detach()) for i, y in enumerate(truth)) / len(truth)
            for x in logits
        ]
        if len(sums) == 1:
            return [1.0]
        rest = [sum(sums[:k] + sums[k + 1 :]) / (len(sums) - 1) for k in range(len(sums))]
        return [a / (b + 1e-6) if over else b / (a + 1e-6) for a, b in zip(sums, rest, strict=True)]

    def changed(self, gradients, s):
        o, values, names = self.settings, self.values, self.names

        def of(scalar, keys):
            found = torch.autograd.grad(scalar, [values[k] for k in keys], retain_graph=True, allow_unused=True)
            return {k: torch.zeros_like(values[k]) if g is None else g for k, g in zip(keys, found, strict=True)}

        together = o.of == "fused"
        fused = [k for k in values if k.startswith(("student.tails", "student.fused"))]
        result = of(self.terms["ce_fused"][0], fused)
        if together:
            classes = self.terms["ce_fused"][0] + o.unimodal_weight * self.terms["ce"][0].sum()
            result = of(classes, [k for k in values if k.startswith("student.")])
        rho = self.ratio(self.alone(s) if together else s.unimodal, s.labels, True)
        sigma = [1.0] * len(names) if self.judged is None else self.ratio(self.judged, self.domains, False)
        for k, name in enumerate(names):
            tail = [n for n in values if n.startswith(f"student.tails.{name}.")]
            head = [n for n in values if n.startswith(f"student.heads.{name}.")]
            scale = (1 - math.tanh(o.alpha_class * rho[k])) if rho[k] > 1 else 1
            if together:
                g_c = {n: scale * result.pop(n) for n in tail}
            else:
                g_c = {n: scale * g for n, g in of(o.unimodal_weight * self.terms["ce"][0][k], tail + head).items()}
                result |= {n: g_c[n] for n in head}
            g_d = {n: torch.zeros_like(values[n]) for n in tail}
            if self.judged is not None:
                scale = (1 - math.tanh(o.alpha_domain * sigma[k])) if sigma[k] > 1 else 1
                found = of(self.judged_all if together else self.terms["domain"][0][k], tail)
                g_d = {n: -o.reversal * o.domain_weight * scale * g for n, g in found.items()}
            dot = sum(float((g_c[n] * g_d[n]).sum()) for n in tail)
            if dot < 0:
                self.conflicts += 1
                if rho[k] > sigma[k] or (rho[k] == sigma[k] and not together):
                    norm = sum(float((g_d[n] ** 2).sum()) for n in tail)
                    g_c = {n: g_c[n] - dot / (norm + 1e-12) * g_d[n] for n in tail}
                else:
                    counted = tail + head if o.norm_with_head and not together else tail
                    norm = sum(float((g_c[n] ** 2).sum()) for n in counted)
                    g_d = {n: g_d[n] - dot / (norm + 1e-12) * g_c[n] for n in tail}
            for n in tail:
                result[n] = result.get(n, 0) + g_c[n] + g_d[n]
        if self.judged is not None:
            own = [n for n in values if n.startswith("method.")]
            if own:
                loss = self.terms["domain"][0].sum()
                result |= of(self.judged_all + loss if together else loss / len(names), own)
        return result
