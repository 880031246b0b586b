"""RNA-Net from its formula."""

from __future__ import annotations

import torch
from plain import Plain


class RNAReference(Plain):
    def loss(self, s):
        order = [n for n in ("video", "flow", "audio", "extra") if n in self.names]
        mean = {n: torch.sqrt((s.pooled[self.names.index(n)] ** 2).sum(dim=1)).mean() for n in order}
        terms = []
        for a in range(len(order)):
            for b in range(a + 1, len(order)):
                terms.append((mean[order[a]] / mean[order[b]] - 1) ** 2)
        alignment = sum(terms) / len(terms) if terms else 0 * mean[order[0]]
        return {**self.erm(s), "alignment": (alignment, self.settings.weight)}
