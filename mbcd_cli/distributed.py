"""Data-parallel training under torchrun: every process takes its rows of the same global batch.

Whatever depends on the whole batch (s_k, DSU's spread, masks, gradients) is exchanged, so that W processes with B / W
clips each do what one process does with B. The one exception is tracked batch norm: each process normalises with the
statistics of its own rows, and the running statistics are averaged.

Letters: B clips of the global batch, W processes, b = B / W clips of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn import functional as F

from mbcd_cli import console
from mbcd_cli.errors import MbcdError, RunError

T = TypeVar("T")
_TIMEOUT = timedelta(hours=2)
"""How long the others wait for a process (rank 0 draws plots, a slow disk takes a checkpoint)."""


class Group:
    """The processes of one training; alone, every method is the identity and costs nothing.

    Attributes:
        rank: this process, 0 to W - 1; rank 0 alone writes and prints.
        world: W.
    """

    def __init__(self, *, rank: int = 0, world: int = 1, control: Any = None) -> None:
        self.rank, self.world = rank, world
        self._control = control  # a gloo group: decisions are made on the CPU, never waiting for a GPU

    @property
    def main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    # ---- tensors of the step

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def average_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Floating tensors averaged over the processes, in place, with one exchange per type."""
        if self.world == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            mine = [t for t in tensors if t.dtype == dtype]
            flat = _flatten_dense_tensors(mine)
            dist.all_reduce(flat)
            flat /= self.world
            for tensor, value in zip(mine, _unflatten_dense_tensors(flat, mine), strict=True):
                tensor.copy_(value)

    def average(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """New tensors, averaged over the processes; the backward pass averages likewise."""
        if self.world == 1:
            return list(tensors)
        return [_Average.apply(tensor, self.world) for tensor in tensors]

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[b, ...] -> the global batch's [B, ...], in order; gradients flow back to every process."""
        return rows if self.world == 1 else _Gather.apply(rows, self.rank, self.world)

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, ...] -> this process' [b, ...]."""
        return rows if self.world == 1 else rows.chunk(self.world)[self.rank]

    # ---- decisions

    def largest(self, *values: int) -> list[int]:
        """Each value's maximum over the processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return tensor.tolist()

    def gathered(self, value: T) -> list[T]:
        """Every process' (picklable) value, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Run `action` in rank 0 while the others wait; they get None.

        Raises:
            SystemExit: in the others, when rank 0 raised; it tells why.
        """
        result, failed = None, 0
        error: BaseException | None = None
        if self.main:
            try:
                result = action()
            except BaseException as caught:
                error, failed = caught, 1
        (failed,) = self.largest(failed)
        if error is not None:
            raise error
        if failed:
            raise SystemExit(1)
        return result

    def leave(self, error: MbcdError) -> None:
        """End all processes, which are in agreement, with one message.

        Raises:
            MbcdError: `error`, in rank 0. SystemExit: in the others.
        """
        if self.main:
            raise error
        raise SystemExit(error.exit_code)


ALONE = Group()
"""A training in one process."""


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, world: int) -> torch.Tensor:
        ctx.world = world
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / world

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _Average.apply(gradient, ctx.world), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, rank: int, world: int) -> torch.Tensor:
        ctx.rank, ctx.world = rank, world
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, rows.detach().contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        # Every process' loss depends on these rows; the losses' mean is taken where gradients are averaged.
        return _SumOwn.apply(gradient, ctx.rank, ctx.world), None, None


class _SumOwn(torch.autograd.Function):
    """The adjoint of `_Gather`: [B, ...] summed over the processes, cut to this one's rows."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, rank: int, world: int) -> torch.Tensor:
        ctx.rank, ctx.world = rank, world
        total = rows.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world)[rank].clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _Gather.apply(gradient, ctx.rank, ctx.world), None, None


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


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that torchrun started this process in (RANK, WORLD_SIZE, ...), else `ALONE`.

    Inside the block all but rank 0 are silent.

    Args:
        device: this process' device; NCCL connects GPUs, gloo CPUs.

    Raises:
        RunError: the processes cannot meet.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    rank = int(os.environ["RANK"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    silent = console.err.quiet, console.out.quiet
    try:
        dist.init_process_group(backend, timeout=_TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=_TIMEOUT) if backend == "nccl" else None
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise RunError(
            f"The {world} processes cannot meet ({backend}): {str(error).splitlines()[0]}",
            "Start them with torchrun, with --rdzv-endpoint naming a node and port that all can reach.",
        ) from error
    try:
        if rank:
            console.err.quiet = console.out.quiet = True
        yield Group(rank=rank, world=world, control=control)
    except MbcdError:
        console.err.quiet, console.out.quiet = silent  # an error of this process alone must be seen
        raise
    finally:
        console.err.quiet, console.out.quiet = silent
        dist.destroy_process_group()
