"""CORAL: correlation alignment (Sun and Saenko, ECCV Workshops 2016), between source domains.

Letters: B clips of the global batch, S source domains, D features.
"""

from __future__ import annotations

import torch

from mbcd_cli.layers import product
from mbcd_cli.methods.alignment import Alignment, mean_over_pairs


class CORAL(Alignment):
    """`Alignment` by first and second moments.

    d = mean_{i<j} [ ||m_i - m_j||^2 / D + ||C_i - C_j||_F^2 / D^2 ], with m_i the mean and C_i the unbiased covariance
    of domain i's features in the batch. The paper aligns covariances alone, of one source with one target, over 4 D^2.
    """

    ticker = ("ce_fused", "distance_fused")

    def distance(self, h: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        """d, []: features h [B, D], member [B, S] of 0 and 1."""
        return moments_apart(h, member)


def moments_apart(h: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """CORAL's d, []: h [B, D], member [B, S] of 0 and 1.

    <C_i, C_j>_F is the sum of squared dot products of centred rows over (n_i - 1)(n_j - 1): [B, B] numbers rather than
    S matrices [D, D]. A domain needs one clip for its mean and two for its covariance.
    """
    n, m = member.sum(dim=0), member.to(h.dtype)
    means = product(m.T, h) / n.clamp(min=1)[:, None]
    centred = h - product(m, means)
    share = m / (n - 1).clamp(min=1)
    inner = product(product(share.T, product(centred, centred.T).square()), share)
    own = inner.diagonal()
    covariances = (own[:, None] + own[None, :] - 2 * inner) / h.shape[1] ** 2
    first = (means[:, None] - means[None, :]).square().mean(dim=2)
    return mean_over_pairs(first, n > 0) + mean_over_pairs(covariances, n > 1)
