"""What the processes of a job wait for and exchange; `place` says which of them this is.

Those of `prepare` meet through the cache's files, those of `train` and `landscape` at MASTER_ADDR:MASTER_PORT, where
they exchange tensors through a `Group`.

Letters: B clips of the global batch, W processes, b = B / W clips of one process.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mbcd_cli.errors import MbcdError, RunError, SettingsError, lines_of
from mbcd_cli.place import UNSET, Place, this_process

T = TypeVar("T")
_LOOK = 0.2  # seconds between two looks at what others have done
_TELL = 10.0  # seconds of waiting after which a person is told for what; then after twice as long, and so on


def wait_for(
    missing: Callable[[], Sequence[T]],
    *,
    named: Callable[[Sequence[T]], str],
    say: Callable[[str], None],
    patience: float,
    remedy: str,
) -> None:
    """Wait until nothing is missing. Signals are answered meanwhile.

    Args:
        missing: what others have not done yet; `named` puts that into words, and `say` tells them when it takes long.
        patience: seconds without progress to endure.
        remedy: what to do when they are over.

    Raises:
        RunError: they are over.
    """
    left = missing()
    progress = told = time.monotonic()
    silence = _TELL
    while left:
        time.sleep(_LOOK)
        now, before = time.monotonic(), len(left)
        left = missing()
        if len(left) < before:
            progress = now
        if left and now - progress > patience:
            raise RunError(f"Waited {patience:.0f} s for {named(left)} in vain.", remedy)
        if left and now - told > silence:
            told, silence = now, 2 * silence
            say(f"Waiting for {named(left)}.")


@dataclass(frozen=True)
class Group(Place):
    """The processes of one job, connected; alone, every method is the identity and costs nothing.

    Attributes:
        control: a gloo group where tensors go through NCCL: decisions are made on the CPU, never waiting for a GPU.
    """

    control: dist.ProcessGroup | None = None

    # ---- tensors of the step

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, [*], summed over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def average_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Floating tensors of any shapes averaged over the processes, in place, with one exchange per type."""
        if self.world == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            alike = [t for t in tensors if t.dtype == dtype]
            flat = _flatten_dense_tensors(alike)
            dist.all_reduce(flat)
            flat /= self.world
            for tensor, value in zip(alike, _unflatten_dense_tensors(flat, alike), strict=True):
                tensor.copy_(value)

    def average(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """New tensors of the same shapes, averaged over the processes; the backward pass averages likewise."""
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
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def gathered(self, value: T) -> list[T]:
        """Every process' (picklable) value, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait until all processes are here. However long that takes, signals are answered."""
        if self.world > 1:
            work = dist.barrier(group=self.control, async_op=True)
            pause = 1e-4
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, _LOOK)
            work.wait()

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
        self.barrier()
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
"""A job of one process."""


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


@contextmanager
def joined(device: torch.device, *, say: Callable[[str], None], patience: float = 7200.0) -> Iterator[Group]:
    """The group that a launcher started this process in, connected while the block runs; else `ALONE`.

    Args:
        device: this process'; NCCL connects GPUs, gloo CPUs.
        say: tells a person which processes are missing.
        patience: seconds that the others wait for a process (rank 0 draws plots, a slow disk takes a checkpoint).

    Raises:
        SettingsError: the launcher's variables contradict each other.
        RunError: the processes cannot meet.
    """
    place = this_process()
    if place.world == 1:
        yield ALONE
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=patience)
    try:
        store = _meet(place, say, patience)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
    except (RuntimeError, ValueError, OSError, dist.DistError) as error:
        raise RunError(
            f"The {place.world} processes cannot meet ({backend}): {lines_of(error)[0]}",
            "Start them with torchrun, with --rdzv-endpoint naming a node and port that all can reach.",
        ) from error
    try:
        yield Group(place.rank, place.world, place.local, control)
    except (MbcdError, SystemExit):  # all of them leave, in agreement
        dist.destroy_process_group()
        raise
    except BaseException as error:
        # To destroy it, as leaving the interpreter does too, would be to wait for an exchange that may never end.
        atexit.register(_leave_at_once, 130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    dist.destroy_process_group()


def _leave_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _meet(place: Place, say: Callable[[str], None], patience: float) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, once every process has written itself down there.

    torch's own meeting waits inside C++, where it says nothing and hears no signal.

    Raises:
        SettingsError: the address is missing. RunError: some process did not come.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise SettingsError(
            f"WORLD_SIZE is {place.world}, and MASTER_ADDR and MASTER_PORT do not name where to meet.", UNSET
        )

    def absent() -> list[int]:
        return [rank for rank in range(place.world) if not store.check([f"process-{rank}"])]

    def unreachable() -> list[int]:
        try:
            socket.create_connection((host, int(port)), timeout=_TELL).close()
        except OSError:
            return [0]
        return []

    def named(ranks: Sequence[int]) -> str:
        return f"process {', '.join(map(str, ranks))} of {place.world} at {host}:{port}"

    wait = partial(wait_for, named=named, patience=patience, remedy=UNSET)
    # torchrun keeps a store of its own there; without it rank 0 does.
    serves = place.main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        wait(unreachable, say=say)
    timeout = timedelta(seconds=patience)
    served = dist.TCPStore(host, int(port), place.world, serves, timeout=timeout, wait_for_workers=False)
    # torchrun may start processes again that have met before.
    store = dist.PrefixStore(f"mbcd-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", served)
    store.set(f"process-{place.rank}", "here")
    wait(absent, say=say if place.main else lambda text: None)  # one of them says it
    return store
