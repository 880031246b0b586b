"""MMD: maximum mean discrepancy (Li, Pan, Wang, Kot, CVPR 2018), between source domains and without their autoencoder.

Letters: B clips of the global batch, S source domains, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mbcd_cli.layers import product
from mbcd_cli.methods.alignment import Alignment, AlignmentSettings, mean_over_pairs
from mbcd_cli.settings import Positive


class MMDSettings(AlignmentSettings):
    """MMD."""

    gammas: tuple[Positive, ...] = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    """Gaussian kernels exp(-gamma r^2) that are summed, r the distance of two features."""


class MMD(Alignment):
    """`Alignment` by mean embeddings: d = mean_{i<j} [ K_ii + K_jj - 2 K_ij ].

    K_ij is the mean of k(a, b) = sum_gamma exp(-gamma ||a - b||^2) over a of domain i and b of domain j, a = b too.
    """

    Settings = MMDSettings
    settings: MMDSettings
    ticker = ("ce_fused", "distance_fused")

    def distance(self, h: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        """d, []: features h [B, D], member [B, S] of 0 and 1."""
        return embeddings_apart(h, member, self.settings.gammas)


def embeddings_apart(h: torch.Tensor, member: torch.Tensor, gammas: Sequence[float]) -> torch.Tensor:
    """MMD's d, []: h [B, D], member [B, S] of 0 and 1."""
    n = member.sum(dim=0)
    centred = h - h.mean(dim=0).detach()  # distances and gradients stay, rounding is less
    squares = centred.square().sum(dim=1)
    itself = torch.eye(len(h), dtype=torch.bool, device=h.device)
    apart = squares[:, None] + squares[None, :] - 2 * product(centred, centred.T)
    apart = apart.clamp(min=0).masked_fill(itself, 0.0)
    kernel = torch.stack([torch.exp(-gamma * apart) for gamma in gammas]).sum(dim=0)
    share = member.to(h.dtype) / n.clamp(min=1)
    inner = product(product(share.T, kernel), share)
    own = inner.diagonal()
    return mean_over_pairs(own[:, None] + own[None, :] - 2 * inner, n > 0)
