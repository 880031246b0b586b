"""Dropout of the global batch: every process of a training drops what one process alone would.

Whatever depends on the whole batch (s_k, DSU's spread, masks, gradients) is exchanged or drawn alike, so that W
processes with B / W clips each do what one process does with B. The one exception is tracked batch norm: each process
normalises with the statistics of its own rows, and the running statistics are averaged.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mbcd_cli.processes import Group


class _OwnRowsDropout(nn.Dropout):
    """nn.Dropout whose mask is drawn for the global batch, as one process would, and cut to this process' rows."""

    def __init__(self, p: float, group: Group) -> None:
        super().__init__(p)
        self._group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, D] -> [b, D]."""
        if not self.training or not self.p:
            return x
        ones = torch.ones(x.shape[0] * self._group.world, *x.shape[1:], dtype=x.dtype, device=x.device)
        return x * self._group.own(F.dropout(ones, self.p))


def share_dropout(model: nn.Module, group: Group) -> None:
    """Make every nn.Dropout of `model` draw for the global batch; names and weights stay as they are."""
    if group.world == 1:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, _OwnRowsDropout(child.p, group).train(child.training))
