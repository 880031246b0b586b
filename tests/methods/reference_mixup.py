"""Mixup from its formula."""

from __future__ import annotations

import numpy as np
import torch
from plain import Plain
from scipy.stats import beta as beta_distribution


class MixupReference(Plain):
    def loss(self, s):
        o = self.settings
        share = (np.floor(s.draws.pop(0).item() * 4096) + 0.5) / 4096
        kept = float(beta_distribution.ppf(share, o.alpha, o.alpha))
        drawn = s.draws.pop(0)
        if o.partner == "any":
            partner = sorted(range(len(drawn)), key=lambda i: drawn[i].item())
        else:
            partner = []
            for i, mine in enumerate(s.domains):
                others = [j for j, theirs in enumerate(s.domains) if theirs != mine]
                partner.append(max(others, key=lambda j: drawn[i, j].item()) if others else i)
        mix = [lambda x: torch.stack([kept * x[i] + (1 - kept) * x[j] for i, j in enumerate(partner)])][0]
        if o.at == "cut":
            s.pooled = [self.pooled(k, mix(s.inputs[n][0])) for k, n in enumerate(self.names)]
            s.h = [self.normalised(h) for h in s.pooled]
        else:
            s.h = [mix(h) for h in s.h]
        seen = s.h if self.joint else [h.detach() for h in s.h]
        s.unimodal = [self.head(h, f"student.heads.{n}") for h, n in zip(seen, self.names, strict=True)]
        s.fused = self.fused(s.h)

        def both(logits):
            return kept * self.ce(logits, s.labels) + (1 - kept) * self.ce(logits, s.labels[partner])

        uni = torch.stack([both(logits) for logits in s.unimodal])
        return {"ce_fused": (both(s.fused), 1.0), "ce": (uni, 1.0)}
