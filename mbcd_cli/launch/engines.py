"""Which engine runs the units, and where."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mbcd_cli.errors import RunError
from mbcd_cli.launch.launch import LAUNCHERS, Engine
from mbcd_cli.launch.local import Local
from mbcd_cli.launch.nodes import demand
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings


@dataclass(frozen=True, slots=True)
class Launching:
    """How units are run.

    Attributes:
        jobs: processes at a time. launcher: one of `LAUNCHERS`.
        slurm: `key=value` parameters of submitit. slurm_tasks: into how many jobs units are grouped; None: one each.
        ray_address: of a cluster that is there; None: begin one of this machine.
    """

    jobs: int = 1
    launcher: str = "local"
    slurm: Sequence[str] = ()
    slurm_tasks: int | None = None
    ray_address: str | None = None

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            RunError: fewer than one job, or no such launcher.
        """
        if self.jobs < 1:
            raise RunError(f"--jobs {self.jobs}: at least one process is needed.", "Use --jobs 1.")
        if self.slurm_tasks is not None and self.slurm_tasks < 1:
            raise RunError(f"--slurm-tasks {self.slurm_tasks}: at least one job is needed.", "Use --slurm-tasks 1.")
        if self.launcher not in LAUNCHERS:
            raise RunError(f"There is no launcher {self.launcher!r}.", f"Use one of {', '.join(LAUNCHERS)}.")

    def engine(
        self, settings: Settings, folder: Path, *, sees: Sequence[Path], place: str = "--runs-dir", say: Say = SILENT
    ) -> Engine:
        """The engine, as these settings have it (threads, device, a unit's share of a Ray node).

        Args:
            folder: of the units' pieces. sees: folders that every node has to see, too.
            place: flag that names another folder.
            say: told what a cluster says.

        Raises:
            RunError: a library of the launcher is missing, or there is no such cluster.
            FileError: `folder` cannot be written to.
        """
        threads, gpu = settings.runtime.threads, settings.runtime.device in ("auto", "cuda")
        if self.launcher == "local":
            return Local(jobs=self.jobs, threads=threads, gpus=_gpus() if gpu else [])
        demands = demand(folder, sees, place=place)
        if self.launcher == "slurm":
            from mbcd_cli.launch.slurm import Slurm

            logs = folder / "submitit"
            return Slurm(logs, options=self.slurm, tasks=self.slurm_tasks, threads=threads, demands=demands, say=say)
        from mbcd_cli.launch.ray import Ray

        return Ray(self.ray_address, asked=settings.ray, demands=demands, threads=threads, gpu=gpu, say=say)


def _gpus() -> list[str]:
    """GPUs to deal out to the processes: all that are visible."""
    import torch

    if not torch.cuda.is_available():
        return []
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    return visible or [str(index) for index in range(torch.cuda.device_count())]
