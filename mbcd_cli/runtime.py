"""Device, threads, determinism: what `settings.runtime` means on this machine."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mbcd_cli.allocator import keep_freed_memory
from mbcd_cli.errors import SettingsError
from mbcd_cli.place import this_process
from mbcd_cli.settings import RuntimeSettings


def pick_device(settings: RuntimeSettings) -> torch.device:
    """The device asked for; `auto` is CUDA, else MPS, else the CPU.

    A process that torchrun started gets the GPU of its local rank where no number is named.

    Raises:
        SettingsError: an unknown device, or one this machine lacks.
    """
    name = settings.device
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    if name == "cuda":
        name = f"cuda:{this_process().local or 0}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"runtime.device: {name!r} is no device.", "Use auto, cpu, cuda, cuda:N or mps.") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise SettingsError(f"runtime.device: this machine has no {name}.", "Use --device auto or cpu.")
    return device


_THREADS_EACH = 8
"""Threads that may be asked for, for each processor."""


def configure(settings: RuntimeSettings) -> torch.device:
    """Apply threads and determinism to this process and return the device.

    `deterministic` asks torch for deterministic kernels wherever it has them (it warns once where it has none);
    without it cuDNN times its kernels and takes the quickest, which may differ from run to run.

    Raises:
        SettingsError: no such device, or far more threads than processors.
    """
    device = pick_device(settings)
    processors = os.cpu_count() or 1
    if settings.threads > _THREADS_EACH * processors:  # some thousands and no other program gets any
        raise SettingsError(
            f"runtime.threads: {settings.threads} threads are too many for {processors} processors.",
            f"Use --threads {processors}, or 0, which leaves it to torch.",
        )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if settings.compile:
        torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)
    else:  # the same, without importing the compiler, which takes longer than all the rest of torch
        torch._C._set_deterministic_algorithms(settings.deterministic, warn_only=True)
    # Nothing here reads memory it did not write; filling it would cost time in every step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = settings.deterministic
    torch.backends.cudnn.benchmark = not settings.deterministic
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu" and settings.precision == "bfloat16" and not _has_bfloat16():
        warnings.warn(
            "This processor has no bfloat16 units: a step takes many times as long as in float32. Use --set "
            "runtime.precision=float32.",
            stacklevel=2,
        )
    if device.type == "cpu":
        keep_freed_memory()
    return device


@contextmanager
def float32_products() -> Iterator[None]:
    """Within, convolutions of float32 on a GPU take float32's products, not TF32's, torch's own choice: with those the
    largest eigenvalue of a Hessian is off by 1.3e-3 (docs/performance.md)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def use_channels_last(settings: RuntimeSettings, device: torch.device) -> bool:
    """Whether convolutions take the channels-last layout (`runtime.channels_last`)."""
    if settings.channels_last == "auto":
        return device.type == "cuda" or settings.precision == "bfloat16"
    return settings.channels_last == "on"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory used so far: of the GPU on CUDA, else of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free: of the GPU on CUDA, else of the machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
