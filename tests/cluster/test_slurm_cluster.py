"""Sweeps on a real Slurm of two nodes on loopback, without accounting: skips where none can be started here.

Needs root and Debian's `slurm-wlm` and `munge`; a fake worker stands for a cell's training.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import helpers
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "sweep"))
from sweep_cases import plan_of

from mbcd_cli.sweep import run as running
from mbcd_cli.sweep import slurm
from mbcd_cli.sweep.state import beside, state

SWEEP = Path(__file__).resolve().parents[1] / "sweep"
CONFIGURATION = """
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MaxArraySize={array}
MpiDefault=none
ReturnToService=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""
ARRAY = 4
"""MaxArraySize of the cluster."""


def control(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True, timeout=30).stdout


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[None]:
    pytest.importorskip("submitit")
    if os.geteuid() or not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged")):
        pytest.skip("no Slurm can be started here (root, slurm-wlm, munge)")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, array=ARRAY, ports=free_ports(3))
    (folder / "slurm.conf").write_text(text)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True, check=False).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True, timeout=30)
    daemons = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"])
    ]
    try:
        idle = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%n"]
        helpers.until(
            lambda: len(subprocess.run(idle, capture_output=True, check=False).stdout.split()) == 2, daemons[0]
        )
        yield
    finally:
        subprocess.run(["scancel", "--me"], check=False, timeout=30)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


@pytest.fixture
def cells(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "WORKER", "fake_worker")
    monkeypatch.setattr(slurm, "_LOOK", 0.2)
    monkeypatch.setenv("PYTHONPATH", f"{SWEEP}{os.pathsep}{SWEEP.parents[1]}")
    found = plan_of("hac", runs=tmp_path / "runs", targets="human", methods="erm", seeds="6")
    found[0].folder.parent.mkdir(parents=True)
    return found


def submit(cells, **more):
    return slurm.submit(cells, options=["timeout_min=5", "cpus_per_task=1"], poll=0.2, **more)


def job_of(cell) -> str:
    return beside(cell.folder, "job").read_text().strip()


def test_more_cells_than_an_array_may_have(cells):
    assert slurm.array_limit("slurm") == ARRAY
    board = submit(cells)
    assert {cell.key for cell in board.done} == {cell.key for cell in cells}
    assert not board.failed
    assert not list(cells[0].folder.parent.glob("*.job"))


def test_a_cancelled_job_is_called_so_and_one_whose_node_goes_down_is_waited_for(cells):
    cancelled, moved = cells[:2]
    for cell in (cancelled, moved):
        beside(cell.folder, "say").write_text("slow slow")
    said = []

    def watch(board):
        if not said and state(cancelled.folder) == state(moved.folder) == "running":
            subprocess.run(["scancel", job_of(cancelled)], check=True, timeout=30)
            node = next(w for w in control("show", "job", job_of(moved)).split() if w.startswith("NodeList="))
            said.append(node.partition("=")[2])
            control("update", f"nodename={said[0]}", "state=down", "reason=test")
        elif len(said) == 1 and (slurm.queue() or {}).get(job_of(moved)) == "PENDING":
            control("update", f"jobid={job_of(moved)}", "starttime=now")  # Slurm waits two minutes; on the other node
            beside(moved.folder, "go").touch()
            said.append("again")

    board = submit(cells[:2], watch=watch)
    control("update", f"nodename={said[0]}", "state=resume")
    assert "was cancelled" in board.failed[cancelled.key]
    assert [cell.key for cell in board.done] == [moved.key]
    assert len(beside(moved.folder, "calls").read_text().splitlines()) == 2
    beside(cancelled.folder, "go").touch()
    assert len(submit(cells[:2]).done) == 2


def test_jobs_of_a_command_that_is_gone_are_found_again(cells):
    class Gone(Exception):
        pass

    beside(cells[0].folder, "say").write_text("slow")

    def leave(board):
        if state(cells[0].folder) == "running":
            raise Gone

    with pytest.raises(Gone):
        submit(cells[:1], watch=leave)
    job = job_of(cells[0])
    beside(cells[0].folder, "go").touch()
    assert len(submit(cells[:1]).done) == 1
    assert {*(slurm.queue() or {})} >= {job}
    assert len(beside(cells[0].folder, "calls").read_text().splitlines()) == 1, "it was submitted once"
