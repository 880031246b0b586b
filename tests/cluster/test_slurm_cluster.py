"""Sweeps on a real Slurm of two nodes on loopback, without accounting: skips where none can be started here.

Needs root and Debian's `slurm-wlm` and `munge`; a fake worker stands for a cell's training.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import helpers
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "sweep"))
from show import show_prepare, show_sweep
from sweep_cases import plan_of, units_of
from test_cache import contents, same, settings_for
from test_sweep_command import cache, cells_of  # noqa: F401

from mbcd_cli.errors import RunError
from mbcd_cli.files import read_records
from mbcd_cli.launch import slurm
from mbcd_cli.launch.engines import Launching
from mbcd_cli.launch.launch import begin, launch
from mbcd_cli.launch.nodes import demand
from mbcd_cli.launch.unit import beside
from mbcd_cli.preparation.launched import prepare_launched
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.runtime import configure
from mbcd_cli.say import Say
from mbcd_cli.sweep import run as running
from mbcd_cli.sweep.state import state
from mbcd_cli.training import train

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
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 Gres=gpu:1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
PartitionName=low Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10
"""
ARRAY = 4
"""MaxArraySize of the cluster."""


def control(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True, timeout=30).stdout


def free_ports(count: int) -> list[int]:
    """Of this machine, that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, int]]:
    """Node -> process of its slurmd, which has mounts of its own."""
    pytest.importorskip("submitit")
    if os.geteuid() or not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged")):
        pytest.skip("no Slurm can be started here (root, slurm-wlm, munge)")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, array=ARRAY, ports=free_ports(3))
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("NodeName=n1 Name=gpu File=/dev/null\n")  # a GPU by word alone
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True, check=False).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True, timeout=30)
    daemons = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in (["slurmctld", "-D"], *(["unshare", "-m", "slurmd", "-D", "-N", node] for node in ("n1", "n2")))
    ]
    try:
        idle = ["sinfo", "--noheader", "--Node", "--states=idle", "--partition=low", "--format=%n"]
        helpers.until(
            lambda: len(subprocess.run(idle, capture_output=True, check=False).stdout.split()) == 2, daemons[0]
        )
        yield {"n1": daemons[1].pid, "n2": daemons[2].pid}
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
    monkeypatch.setattr(running, "CELL", "fake_worker:serve")
    monkeypatch.setattr(slurm, "_LOOK", 0.2)
    monkeypatch.setattr("submitit.Job._results_timeout_s", 3)  # no file is late on one machine
    monkeypatch.setenv("PYTHONPATH", f"{SWEEP}{os.pathsep}{SWEEP.parents[1]}")
    found = plan_of("hac", runs=tmp_path / "runs", targets="human", methods="erm", seeds="6")
    found[0].folder.parent.mkdir(parents=True)
    return found


def submit(cells, *options, watch=lambda board: None, retry_failed=False, **more):
    folder = cells[0].folder.parent
    board = begin(units_of(cells), retry_failed=retry_failed)
    more.setdefault("demands", demand(folder, []))
    options = ["timeout_min=5", "cpus_per_task=1", *options]
    return launch(board, slurm.Slurm(folder / "submitit", options=options, **more), watch=watch, poll=0.2)


def job_of(cell) -> str:
    return beside(cell.folder, "job").read_text().strip()


@contextmanager
def mounted(cluster, node: str, *words: object) -> Iterator[None]:
    """Inside the block the node sees another file system at the place that comes last."""
    there = ["nsenter", "--mount", "--target", str(cluster[node])]
    subprocess.run([*there, "mount", *map(str, words)], check=True, timeout=30)
    yield
    subprocess.run([*there, "umount", "--lazy", str(words[-1])], check=True, timeout=30)


def hurry(cell, *first: str) -> None:
    """Slurm begins a job anew after two minutes: now."""
    if beside(cell.folder, "job").is_file() and (slurm.queue() or {})[job_of(cell)].state == "PENDING":
        for word in first:
            control(word, job_of(cell))
        begin_now(job_of(cell))


def begin_now(job: str) -> None:
    """If it has not just begun: then there is nothing to change."""
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=False, timeout=30)


def hears(said):
    """Into a list, but for the numbers of the jobs."""
    return Say(lambda line: None if line.startswith("Slurm has the jobs") else said.append(line))


def test_more_cells_than_an_array_may_have(cells):
    assert slurm.job_limit("slurm") == ARRAY
    said = []
    board = submit(cells, say=Say(said.append))
    assert said[0] == f"The cluster takes {ARRAY} jobs of one array: {len(cells)} units go into {ARRAY}."
    (line,) = said[1:]
    assert re.fullmatch(rf"Slurm has the jobs (\d+)_0 to \1_{ARRAY - 1}, whose states squeue tells; .*", line)
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
        elif len(said) == 1 and (slurm.queue() or {})[job_of(moved)].state == "PENDING":
            begin_now(job_of(moved))  # Slurm waits two minutes; on the other node
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
        print(submit(cells[:1], watch=leave))
    job = job_of(cells[0])
    beside(cells[0].folder, "go").touch()
    assert len(submit(cells[:1]).done) == 1
    assert {*(slurm.queue() or {})} >= {job}
    assert len(beside(cells[0].folder, "calls").read_text().splitlines()) == 1, "it was submitted once"


def test_one_task_runs_its_units_one_after_the_other_and_a_time_limit_only_begins_it_anew(cells):
    """Slurm's own signal, as it comes before a time limit: the running unit stops, and the job goes on from there."""
    beside(cells[1].folder, "say").write_text("slow ok")
    jobs, said = set(), []

    def watch(board):
        if state(cells[1].folder) == "running" and not said:
            jobs.update(job_of(cell) for cell in cells[1:3])
            assert len(board.done) == 1, "the first is told before the job ends"
            assert list(board.running) == [cells[1].key]
            said.append(next(iter(board.running.values())))
            subprocess.run(["scancel", "--signal=USR2", job_of(cells[1])], check=True, timeout=30)
        elif said:
            hurry(cells[1])

    board = submit(cells[:3], tasks=1, watch=watch)
    assert len(board.done) == 3
    assert len(jobs) == 1
    assert said[0] in ("n1", "n2")
    assert [len(beside(cell.folder, "calls").read_text().splitlines()) for cell in cells[:3]] == [1, 2, 1]


def test_a_job_that_slurm_holds_is_told_in_one_line(cells):
    said, done = [], []
    beside(cells[0].folder, "say").write_text("slow ok")

    def watch(board):
        if not done and state(cells[0].folder) == "running":
            control("requeuehold", job_of(cells[0]))
            done.append("held")
        elif said:
            hurry(cells[0], "release")

    board = submit(cells[:1], watch=watch, say=hears(said))
    assert len(board.done) == 1
    assert len(said) == 1
    assert "Slurm holds job" in said[0]
    assert "scontrol release" in said[0]


def test_a_job_that_never_begins_is_told_in_one_line(cells):
    said = []

    def watch(board):
        if said and board.handed:
            subprocess.run(["scancel", job_of(cells[0])], check=True, timeout=30)

    board = submit(cells[:1], "timeout_min=90", watch=watch, say=hears(said))
    assert "was cancelled" in board.failed[cells[0].key]
    assert len(said) == 1
    assert "keeps job" in said[0]
    assert re.search(r"\(Partition(TimeLimit|Config)\)", said[0])


def test_jobs_that_ask_for_a_gpu_have_one_each_on_the_node_that_has_it(cells):
    """One has two processors and a GPU by word alone, the other has none: the jobs wait for each other."""
    some, told, reasons = cells[:3], {cell.key: [] for cell in cells[:3]}, set()
    for cell in some:
        beside(cell.folder, "say").write_text("slow")

    def watch(board):
        assert len(board.running) < 2
        for cell in some:
            if cell.key in board.running and len(told[cell.key]) < 5:
                told[cell.key].append(control("show", "job", "-d", job_of(cell)))
                reasons.update(job.reason for job in slurm.queue().values() if job.state == "PENDING")
                if len(told[cell.key]) == 5:
                    beside(cell.folder, "go").touch()

    assert len(submit(some, "gpus_per_node=1", watch=watch).done) == 3
    assert [beside(cell.folder, "calls").read_text().split()[1] for cell in some] == ["0"] * 3, "CUDA_VISIBLE_DEVICES"
    assert all("Nodes=n1 CPU_IDs=0 Mem=0 GRES=gpu:1(IDX:0)" in look for looks in told.values() for look in looks)
    assert "Resources" in reasons


def test_a_gpu_that_no_node_has_is_one_error(cells, capfd):
    with pytest.raises(RunError, match=r"^Slurm refuses the jobs: Requested node config") as caught:
        submit(cells, "gpus_per_node=2")
    assert "(--slurm timeout_min=5 --slurm cpus_per_task=1 --slurm gpus_per_node=2)" in caught.value.remedy
    assert capfd.readouterr().err == ""


def test_a_job_that_is_preempted_is_waited_for(cells):
    beside(cells[0].folder, "say").write_text("slow ok")
    others = []

    def watch(board):
        if not others and state(cells[0].folder) == "running":
            wide = ["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1", "--output=/dev/null"]
            others.append(subprocess.run(wide, check=True, timeout=30, capture_output=True, text=True).stdout)
        elif others:
            hurry(cells[0])

    board = submit(cells[:1], watch=watch)
    assert len(board.done) == 1
    assert len(beside(cells[0].folder, "calls").read_text().splitlines()) == 2


def test_a_node_without_the_folder_or_of_another_version_is_told_in_one_line(cells):
    said, folder = [], cells[0].folder.parent
    board = submit(cells[:1], demands=demand(folder, [folder / "elsewhere"]), say=hears(said))
    assert list(board.failed) == [cells[0].key]
    assert len(said) == 1
    assert re.search(r"node n[12] does not see the folder .*elsewhere", said[0])


def test_a_node_that_alone_does_not_see_the_runs_is_told_by_name(cluster, cells, tmp_path):
    said, folder = [], cells[0].folder.parent
    logs = f"folder={tmp_path / 'logs'}"
    with mounted(cluster, "n2", "-t", "tmpfs", "tmpfs", folder):
        alone = submit(cells[:1], "slurm_exclude=n1", logs, say=hears(said))
    assert re.search(r"^warning: node n2 does not see the folder .*hac; --slurm slurm_exclude=NODE", *said)
    assert list(alone.failed) == [cells[0].key]
    assert len(submit(cells[:1], "slurm_exclude=n1", logs, retry_failed=True).done) == 1


def test_a_node_that_does_not_even_see_the_job_is_told_by_name(cluster, cells):
    """Nothing of the job can be read or written there."""
    with mounted(cluster, "n2", "-t", "tmpfs", "tmpfs", cells[0].folder.parent):
        (why,) = submit(cells[:1], "slurm_exclude=n1").failed.values()
    assert re.search(r"^job \d+(_0)? ended on node n2 \(FAILED\) without a result or a log: that node may not see", why)


def test_a_full_disk_of_one_node_is_told_by_name(cluster, cells, tmp_path):
    said, folder = [], cells[0].folder.parent
    demands = demand(folder, [])
    upper = tmp_path / "upper"
    upper.mkdir()
    logs = f"folder={tmp_path / 'logs'}"
    with mounted(cluster, "n2", "-t", "tmpfs", "-o", "size=16k", "tmpfs", upper):
        fill = f"mkdir {upper}/u {upper}/w; head -c 1M /dev/zero > {upper}/full"
        subprocess.run(["nsenter", "-m", "-t", str(cluster["n2"]), "sh", "-c", fill], check=False, timeout=30)
        layers = f"lowerdir={folder},upperdir={upper}/u,workdir={upper}/w"
        with mounted(cluster, "n2", "-t", "overlay", "-o", layers, "overlay", folder):
            board = submit(cells[:1], "slurm_exclude=n1", logs, demands=demands, say=hears(said))
    assert list(board.failed) == [cells[0].key]
    assert re.search(r"node n2 cannot write into .*hac: No space left on device", *said)


def test_a_version_that_one_node_alone_has_is_told_by_name(cluster, cells, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "sitecustomize.py").write_text(
        "from importlib import metadata\nhere = metadata.version\n"
        "metadata.version = lambda name: '0.1' if name == 'torch' else here(name)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'here'}{os.pathsep}{os.environ['PYTHONPATH']}")
    said = []
    with mounted(cluster, "n2", "--bind", tmp_path / "there", tmp_path / "here"):
        submit(cells[:1], "slurm_exclude=n1", say=hears(said))
    assert re.search(r"node n2 has torch 0\.1, and here it is 2\.", *said)


def test_a_cache_is_prepared(cluster, tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    alone = prepare(settings_for(root, tmp_path / "one", "cache.shard_clips=1"))
    settings, said = settings_for(root, tmp_path / "two", "cache.shard_clips=1"), []
    one_at_a_time = ["timeout_min=5", "cpus_per_task=1", "slurm_array_parallelism=1", "gpus_per_node=1"]
    how = Launching(jobs=2, launcher="slurm", slurm=one_at_a_time)
    shared = prepare_launched(settings, how=how, corruptions=(), severities=(1,), say=hears(said))
    for name, entry in alone.modalities.items():
        assert same(contents(Path(entry.folder)), contents(Path(shared.modalities[name].folder)))
    assert sum("has ended" in line for line in said) == 2
    second = max(slurm.queue() or {}, key=lambda job: [*map(int, job.split("_"))])
    assert slurm.queue()[second].state == "CANCELLED", "nothing was left for it"
    first = f"{second.partition('_')[0]}_0"
    helpers.until(lambda: slurm.queue()[first].state not in ("RUNNING", "COMPLETING"))
    assert (slurm.queue()[first].state, slurm.queue()[first].node) == ("COMPLETED", "n1"), "which has a GPU"


@pytest.mark.stress  # two processes that import torch, one after the other
@pytest.mark.timeout(1800)
def test_a_real_run_writes_its_checkpoint_before_the_time_limit_and_goes_on_from_it(cluster, request, tmp_path):
    """Slurm's own signal, as it comes before a time limit; the numbers are those of a run that nobody stopped."""
    prepared = request.getfixturevalue("cache")
    (cell,) = cells_of(prepared, tmp_path / "runs", methods="mbcd")
    records, jobs, reached, since = cell.folder / "metrics.jsonl", set(), [], []

    def watch(board):
        if beside(cell.folder, "job").is_file():
            jobs.add(job_of(cell))
        if board.running and not reached and len(read_records(records)) >= 1:
            subprocess.run(["scancel", "--signal=USR2", job_of(cell)], check=True, timeout=30)
            reached.append(0)
        elif reached and state(cell.folder) == "interrupted":
            reached.append(len(read_records(records)))
            assert (cell.folder / "checkpoints" / "last.pt").is_file()
            since.append(time.monotonic())
            if since[-1] - since[0] > 5:  # begun while its node still ends it, a job fails
                hurry(cell)

    options = ["timeout_min=30", "cpus_per_task=1"]
    board = launch(
        begin(units_of([cell]), retry_failed=False),
        Launching(launcher="slurm", slurm=options).engine(cell.settings, cell.folder.parent, sees=[prepared]),
        watch=watch,
        poll=0.1,
    )
    assert (len(board.done), board.failed, len(jobs)) == (1, {}, 1)
    settings, data = open_for_training(cell.settings)
    configure(settings.runtime.model_copy(update={"threads": 1}))
    train.train(settings, data, run=tmp_path / "straight", resume=False, overwrite=False)
    kept, straight = read_records(records), read_records(tmp_path / "straight" / "metrics.jsonl")
    assert 1 <= reached[1] < len(straight), "it was stopped on its way"
    assert [(one["epoch"], one["target"]) for one in kept] == [(one["epoch"], one["target"]) for one in straight]


@pytest.mark.stress
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("show", [show_sweep, show_prepare])
def test_two_thousand_units_while_nodes_and_the_command_die(cluster, tmp_path, show):
    def trouble(rng):
        node = rng.choice(("n1", "n2"))
        control("update", f"nodename={node}", "state=down", "reason=test")
        time.sleep(rng.uniform(0.2, 2))
        control("update", f"nodename={node}", "state=resume")

    def tend():
        for node in ("n1", "n2"):  # one whose processes take long to be killed is drained
            words = ["scontrol", "update", f"nodename={node}", "state=resume"]
            subprocess.run(words, check=False, capture_output=True, timeout=30)
        for job, queued in (slurm.queue() or {}).items():
            if queued.state == "PENDING":  # Slurm begins it anew after two minutes, or holds it: now
                subprocess.run(["scontrol", "release", job], check=False, timeout=30)
                begin_now(job)

    options = ["timeout_min=30", "cpus_per_task=1"]
    print(show(tmp_path, {"launcher": "slurm", "slurm_tasks": ARRAY, "slurm": options}, trouble=trouble, tend=tend))
