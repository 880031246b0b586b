"""Encoders as ordered lists of named stages, cut once into a frozen trunk and a trained tail.

Letters: B clips, C channels, T H W positions, D features. `Parts` is what crosses a cut: one tensor [B, C, ...] per
path of the encoder (SlowFast has two, every other encoder one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mbcd_cli.data.records import Parts
from mbcd_cli.encoders.wants import Wants
from mbcd_cli.errors import FOREIGN, CacheError, SettingsError, lines_of

Noise = Callable[[Parts], Parts]
TOGETHER = 16
"""Clips that a trunk takes at once in eval mode: its activations are many times what it returns."""


class Stages(nn.Module):
    """A run of named stages. A stage takes and returns one tensor, or a tuple of them where the encoder has paths."""

    def __init__(self, stages: Mapping[str, nn.Module], *, noise_before: Iterable[str] = ()) -> None:
        super().__init__()
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.names = tuple(stages)
        self.noise_before = frozenset(noise_before)

    def cast(self, parts: Parts) -> Parts:
        """Parts [B, C, ...] in the type of the parameters (where there are none, in float32 or their own wider one)."""
        reference = next((p for p in self.parameters()), None)
        if reference is None:
            return tuple(part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
        return tuple(part.to(reference.dtype) for part in parts)

    def run(self, parts: Parts, noise: Noise | None = None) -> Parts:
        """Parts [B, C, ...] before the first stage -> after the last; `noise` is applied where `noise_before` says."""
        for name in self.names:
            if noise is not None and name in self.noise_before:
                parts = noise(parts)
            out = getattr(self, name)(parts[0] if len(parts) == 1 else parts)
            parts = out if isinstance(out, tuple) else (out,)
        return parts

    def load_prepared(self, weights: Mapping[str, torch.Tensor], name: str) -> None:
        """Load what `prepare` stored beside the cache of the modality `name`.

        Raises:
            CacheError: those are other weights' names or shapes.
        """
        try:
            self.load_state_dict(dict(weights))
        except (RuntimeError, *FOREIGN) as error:
            raise CacheError(
                f"The weights stored with the cache of {name} do not fit its encoder: {lines_of(error)[-1]}",
                "Delete that cache and run `mbcd prepare` again.",
            ) from error


class Trunk(Stages):
    """The frozen stages before the cut: weights that are never trained.

    By default it stays in eval mode, so that a clip's features depend on that clip alone and can be cached. A live
    trunk follows train mode, as the reference's does (method.md section Deviations): its batch norms then normalise
    with the batch's statistics, and their running statistics move.
    """

    def __init__(self, stages: Mapping[str, nn.Module], *, live: bool = False) -> None:
        super().__init__(stages)
        self.live = live
        self.requires_grad_(False)
        self.train(live)

    def train(self, mode: bool = True) -> Trunk:
        """Train or eval mode of a live trunk; eval mode of any other."""
        return super().train(mode and self.live)

    def update_as_if(self, passes: int) -> None:
        """Let one forward pass in train mode move the running statistics as `passes` over the same batch would.

        r <- (1 - m) r + m b, n times, is r <- (1 - m)^n r + (1 - (1 - m)^n) b. Call it once.
        """
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module.momentum is not None:
                module.momentum = 1 - (1 - module.momentum) ** passes

    @torch.no_grad()
    def forward(self, parts: Parts) -> Parts:
        """Decoded parts -> parts at the cut, [B, C, ...]; in eval mode, where no clips meet, some at a time."""
        if self.training:
            return self.run(self.cast(parts))
        pieces = zip(*(part.split(TOGETHER) for part in parts), strict=True)
        done = [self.run(self.cast(piece)) for piece in pieces]
        return done[0] if len(done) == 1 else tuple(map(torch.cat, zip(*done, strict=True)))


class Tail(Stages):
    """The trained stages from the cut on, after those of the trunk that are cheaper to recompute than to cache.

    Attributes:
        dim: D, the number of pooled features it returns.
        frozen: stages that are never trained and always in eval mode: leading ones that belong to the trunk, or all.
    """

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        *,
        dim: int,
        noise_before: Iterable[str] = (),
        frozen: Iterable[str] = (),
    ) -> None:
        super().__init__(stages, noise_before=noise_before)
        self.dim = dim
        self.frozen = tuple(frozen)
        for name in self.frozen:
            getattr(self, name).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Tail:
        """Train or eval mode of all but the frozen stages."""
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    def forward(self, parts: Parts, noise: Noise | None = None) -> torch.Tensor:
        """Parts at the cut (of any type, as they come from the cache) -> pooled features [B, D]."""
        (features,) = self.run(self.cast(parts), noise)
        return features


class StagedEncoder(nn.Module):
    """An encoder as an ordered mapping of stages, the first called `input`, the one that averages called `pool`.

    Args:
        stages: name -> module, in order. `input` turns decoded tensors (uint8 frames, spectrograms) into the
            network's input and has no parameters; `pool` returns [B, dim]; an optional `adapter` follows it.
        dim: D, features after pooling.
        raw: where the input is features already: how many `pool` makes of what `input` returns.
        recomputed: cheap stages whose outputs are not worth caching; a cut right after one moves it, frozen, to
            the tail (SlowFast's lateral connections).
        wants: what it wants of a decoded view, where that is known.
    """

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        *,
        dim: int,
        recomputed: Iterable[str] = (),
        wants: Wants | None = None,
        raw: int | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.dim = dim
        self.recomputed = frozenset(recomputed)
        self.wants = wants
        self.raw = raw

    @property
    def names(self) -> tuple[str, ...]:
        """Stage names in order: the cuts that can be asked for."""
        return tuple(self.stages)

    def cut(self, name: str, *, live: bool = False, frozen: bool = False) -> tuple[Trunk, Tail]:
        """Split before stage `name`: (trunk = the stages before it, tail = that stage and all after it).

        `recomputed` stages right before `name` go to the tail too, frozen, unless the trunk is live: that one holds
        all frozen stages and is run with the tail.
        The two share the encoder's modules; running trunk then tail equals running the whole encoder.

        Args:
            live: the trunk runs with the tail.
            frozen: the whole tail is, and a live trunk is in eval mode. Where the input is features already and nothing
                of the encoder was prepared, the tail is `input` and `pool` alone: what lies between was never trained.

        Raises:
            SettingsError: there is no such stage.
        """
        if name not in self.names:
            raise SettingsError(f"This encoder has no stage {name!r}.", f"Cut at one of: {', '.join(self.names)}.")
        at = start = self.names.index(name)
        while not live and start > 0 and self.names[start - 1] in self.recomputed:
            start -= 1
        before = {n: self.stages[n] for n in self.names[:start]}
        after = {n: self.stages[n] for n in self.names[start:]}
        still = self.names[start:at]
        # Feature noise (DSU) belongs on feature maps: where features first enter the tail, and before pooling.
        first = next((n for n in after if n != "input" and n not in still), None)
        noisy = {n for n in (first, "pool") if n in after and n != "adapter"}
        dim = self.dim
        if frozen and self.raw is not None and name == "input":
            after, dim = {n: after[n] for n in ("input", "pool")}, self.raw
        still = tuple(after) if frozen else still
        return Trunk(before, live=live and not frozen), Tail(after, dim=dim, noise_before=noisy, frozen=still)

    def forward(self, parts: Parts) -> torch.Tensor:
        """Decoded parts -> pooled features [B, D], all stages at once (for comparisons; training uses the tail)."""
        return Tail(dict(self.stages.items()), dim=self.dim)(parts)


class Normalise(nn.Module):
    """(x - mean) / std per channel; x is [B, C, ...] of any real type, the result floating."""

    def __init__(self, mean: Iterable[float], std: Iterable[float], *, dims: int) -> None:
        super().__init__()
        shape = (1, -1, *([1] * (dims - 2)))
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(shape), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).reshape(shape), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, ...] -> the same, normalised."""
        return (x - self.mean) / self.std


class GlobalPool(nn.Module):
    """Mean over all positions: [B, C, ...] -> [B, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, ...] -> [B, C]."""
        return x.flatten(2).mean(2)


class Adapter(nn.Module):
    """A small residual MLP on pooled features [B, D]; it begins as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, max(dim // 4, 8))
        self.up = nn.Linear(self.down.out_features, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, D]."""
        return x + self.up(torch.relu(self.down(x)))
