"""Encoders of plain tensor modalities (.npy): an MLP for vectors, 1-D convolutions for sequences.

Letters: B clips, T steps, D values per vector or step.
"""

from __future__ import annotations

import torch
from torch import nn

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.encoders.staged import GlobalPool, StagedEncoder
from mbcd_cli.errors import SettingsError


class _StepsFirst(nn.Module):
    """[B, T, D] -> [B, D, T], as convolutions want it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def array_mlp(settings: ArrayModality) -> StagedEncoder:
    """Vectors [B, D], or sequences [B, T, D] flattened -> [B, 8 width]."""
    inside = settings.dimension * (settings.length or 1)
    hidden = 8 * settings.width
    return StagedEncoder(
        {
            "input": nn.Flatten(),
            "layer1": nn.Sequential(nn.Linear(inside, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)),
            "layer2": nn.Sequential(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)),
            "pool": nn.Identity(),
        },
        dim=hidden,
        raw=inside,
    )


def array_conv(settings: ArrayModality) -> StagedEncoder:
    """Sequences [B, T, D] -> [B, 8 width]."""
    if settings.length is None:
        raise SettingsError(
            "array-conv reads sequences, and this modality holds vectors.",
            "Set modalities.NAME.length to the number of steps, or use encoder array-mlp.",
        )
    w = settings.width

    def block(inside: int, out: int, kernel: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(inside, out, kernel, 2, kernel // 2, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)
        )

    return StagedEncoder(
        {
            "input": _StepsFirst(),
            "layer1": block(settings.dimension, 2 * w, 5),
            "layer2": block(2 * w, 4 * w, 3),
            "layer3": block(4 * w, 8 * w, 3),
            "pool": GlobalPool(),
        },
        dim=8 * w,
        raw=settings.dimension,
    )
