"""Layers on vectors that round alike in a training alone and in one of many that are computed at once (below vmap).

torch's own do not: a linear layer alone adds its bias inside the product and takes its gradients' products by how
their factors lie in memory, a batch norm walks columns, dropout draws in the order that its input lies in memory. Of
these every operation is the same on [B, D] and, for K members, on [K, B, D], where the library of products (MKL) takes
each of many as it takes one.

Letters: B clips (of this process, where torchrun started several), D features.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mbcd_cli.processes import ALONE, Group


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, as one of a batch: [N, D] and [D, M] -> [N, M]."""
    return torch.bmm(a.unsqueeze(0), b.unsqueeze(0)).squeeze(0)


class Linear(nn.Linear):
    """nn.Linear as (W x^T)^T + b: below vmap its gradients come out in the layout of the weights, so that nothing is
    copied (a seventh of a population's step)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D_in] -> [B, D_out]."""
        if x.dim() != 2:
            return super().forward(x)
        out = product(self.weight, x.mT).mT
        return out if self.bias is None else out + self.bias.to(out.dtype)


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d of rows as a layer norm of their transpose."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, D]."""
        if x.dim() != 2 or not (self.affine and self.momentum and self.track_running_stats):
            return super().forward(x)
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return (x * scale + (self.bias - self.running_mean * scale)).to(x.dtype)
        if len(x) == 1:
            return super().forward(x)  # which refuses it
        columns = x.mT.to(self.weight.dtype)
        with torch.no_grad():
            mean = columns.mean(dim=1)  # torch.var_mean takes one value after the other: up to 11 times as long
            variance = (columns - mean[:, None]).square().sum(dim=1) / (len(x) - 1)
            self.running_mean.mul_(1 - self.momentum).add_(self.momentum * mean)
            self.running_var.mul_(1 - self.momentum).add_(self.momentum * variance)
            self.num_batches_tracked.add_(1)
        return (F.layer_norm(columns, (len(x),), eps=self.eps).mT * self.weight + self.bias).to(x.dtype)


class Dropout(nn.Dropout):
    """nn.Dropout whose mask is drawn clip by clip, for the global batch of all processes and cut to this one's rows.

    So every process of a training drops what one process alone would. Whatever else depends on the whole batch (s_k,
    DSU's spread, masks, gradients) is exchanged or drawn alike, too: W processes with B / W clips each do what one does
    with B. The one exception is tracked batch norm: each process normalises with the statistics of its own rows, and
    the running statistics are averaged.

    Attributes:
        group: the processes that share the batch.
    """

    group: Group = ALONE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, D]."""
        if not self.training or not self.p:
            return x
        ones = torch.ones(x.shape[0] * self.group.world, *x.shape[1:], dtype=x.dtype, device=x.device)
        return x * self.group.own(F.dropout(ones, self.p))


_OURS = {nn.Linear: Linear, nn.BatchNorm1d: BatchNorm, nn.Dropout: Dropout}


def rounding_alike(module: nn.Module) -> None:
    """Have ours in the place of torch's layers; names and weights stay as they are."""
    for one in module.modules():
        one.__class__ = _OURS.get(type(one), type(one))


def share_dropout(module: nn.Module, group: Group) -> None:
    """Have its dropouts draw for the global batch of a group."""
    for one in module.modules():
        if isinstance(one, Dropout):
            one.group = group
