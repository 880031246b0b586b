from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from landscape_cases import make_checkpoint, make_dataset, make_settings

from mbcd_cli.landscape import measure as command
from mbcd_cli.landscape.store import read_grid
from mbcd_cli.place import this_process

_RANK = """
import sys
sys.path[:0] = {here!r}
import torch
torch.set_num_threads(1)
import test_landscape_distributed as here
print(here.measure({output!r}))
"""


def measure(output: str) -> str:
    settings = make_settings(
        analyses=("surface", "flatness", "worst_case", "curvature"),
        ascent_steps=2,
        density_probes=0,
        trace_probes=2,
        eigenvalues=1,
    )
    dataset = make_dataset(settings)
    pairs = [("best", make_checkpoint(settings, dataset))]
    result = command.landscape(settings, dataset, pairs, output=Path(output))
    return f"{this_process().rank} {result.figures.checkpoints['best'].surface.points}"


def ranks(output: Path, world: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = _RANK.format(here=[str(Path(__file__).parents[up]) for up in (0, 1)], output=str(output))
    processes = []
    for rank in range(world):
        group = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in group.items()}, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        )
    answers = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * world
    return answers


def test_processes_share_the_grids(tmp_path):
    assert ranks(tmp_path / "two", 2) == ["0 25", "1 25"]
    assert measure(str(tmp_path / "one")) == "0 25"
    for name in ("surface", "flatness", "worst_case"):
        two, one = (read_grid(tmp_path / which / f"{name}-best.h5") for which in ("two", "one"))
        assert two.missing == 0
        np.testing.assert_allclose(two.loss, one.loss, rtol=1e-5)  # threads differ
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
