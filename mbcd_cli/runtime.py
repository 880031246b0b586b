"""Device, threads, determinism: what `settings.runtime` means on this machine."""

from __future__ import annotations

import torch

from mbcd_cli.errors import SettingsError
from mbcd_cli.settings import RuntimeSettings


def pick_device(settings: RuntimeSettings) -> torch.device:
    """The device asked for; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        SettingsError: an unknown device, or one this machine lacks.
    """
    name = settings.device
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(
            f"runtime.device: {name!r} is no device.", "Use auto, cpu, cuda, cuda:N or mps."
        ) from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise SettingsError(f"runtime.device: this machine has no {name}.", "Use --device auto or cpu.")
    return device


def configure(settings: RuntimeSettings) -> torch.device:
    """Apply threads and determinism to this process and return the device."""
    device = pick_device(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return device
