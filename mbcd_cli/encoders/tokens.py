"""Transformers as stages: what stands between two of them is channel-first, like feature maps.

Letters: B clips, C channels, T frames, H W pixels, N tokens (special ones first), D features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from mbcd_cli.encoders.staged import Normalise
from mbcd_cli.encoders.wants import Wants

Pooling = Literal["mean", "first", "first two", "head"]


def pixels(wants: Wants) -> Normalise:
    """The `input` stage of frames: [B, 3, T, H, W] uint8 RGB -> the same, as the network wants its values."""
    told = wants.settings()
    return Normalise(told["mean"], told["std"], dims=5)


def single_frames(x: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] -> [B T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """[B, D, N] -> [B, N, D]; of frames encoded alone [B, D, T, N] -> [B T, N, D]."""
    x = x.movedim(1, -1)
    return x.flatten(0, 1) if x.dim() == 4 else x


def channels_first(tokens: torch.Tensor, clips: int | None = None) -> torch.Tensor:
    """[B, N, D] -> [B, D, N]; [B T, N, D] of B `clips` -> [B, D, T, N]. In memory as in a cache, for the same sums."""
    if clips is not None:
        tokens = tokens.unflatten(0, (clips, -1))
    return tokens.movedim(-1, 1).contiguous()


class Block(nn.Module):
    """One layer of a transformer; `args` are what its owner passes besides the tokens."""

    def __init__(self, layer: nn.Module, *args: object) -> None:
        super().__init__()
        self.layer = layer
        self.args = args

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D, N] or [B, D, T, N] -> the same, perhaps of other N and D."""
        out = self.layer(tokens_first(x), *self.args)
        return channels_first(out[0] if isinstance(out, tuple) else out, len(x) if x.dim() == 4 else None)


class TokenPool(nn.Module):
    """The final norm, tokens to one vector, and the vectors of a clip's frames to one.

    Args:
        norm: of tokens. how: the mean of all, the first, the mean of the first two, or `head` of all.
        head: from tokens [B, N, D] where `how` says so, else of the pooled vector [B, D].
        over_time: of frames encoded alone.
    """

    def __init__(self, norm: nn.Module | None, how: Pooling, head: nn.Module | None = None, over_time: str = "mean"):
        super().__init__()
        self.norm, self.head = norm or nn.Identity(), head or nn.Identity()
        self.how, self.over_time = how, over_time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D, N] or [B, D, T, N] -> [B, D]."""
        tokens = self.norm(tokens_first(x))
        if self.how == "head":
            vectors = self.head(tokens)
        else:
            special = {"mean": None, "first": 1, "first two": 2}[self.how]
            vectors = self.head(tokens[:, :special].mean(1))
        return over_time(vectors, len(x), self.over_time) if x.dim() == 4 else vectors


def over_time(vectors: torch.Tensor, clips: int, how: str) -> torch.Tensor:
    """[B T, D] -> [B, D]: the mean or the largest over the frames of a clip."""
    vectors = vectors.unflatten(0, (clips, -1))
    return vectors.mean(1) if how == "mean" else vectors.amax(1)
