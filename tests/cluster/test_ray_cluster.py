"""Sweeps on a real Ray cluster of three nodes on loopback: skips where Ray is not installed (`uv sync --group ray`)."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import helpers
import pytest

sys.path += [str(Path(__file__).resolve().parents[1] / room) for room in ("preparation", "sweep")]
from show import cost, show_prepare, show_sweep
from sweep_cases import plan_of, units_of
from test_cache import contents, same, settings_for
from test_passport import ours, weights

from mbcd_cli.errors import RunError
from mbcd_cli.launch.engines import Launching
from mbcd_cli.launch.launch import begin, launch
from mbcd_cli.launch.nodes import demand
from mbcd_cli.launch.ray import Ray
from mbcd_cli.launch.unit import beside
from mbcd_cli.preparation.launched import prepare_launched
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.say import Say
from mbcd_cli.settings import RaySettings
from mbcd_cli.sweep import run as running
from mbcd_cli.sweep.state import state

SWEEP = Path(__file__).resolve().parents[1] / "sweep"


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # looked at when Ray is imported
        ray = pytest.importorskip("ray")
        from ray.cluster_utils import Cluster

        environ.setenv("PYTHONPATH", f"{SWEEP}{os.pathsep}{SWEEP.parents[1]}")
        environ.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environ.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        quick = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 10,
            "worker_niceness": 0,  # or units get what other work on this machine leaves
        }
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
        three = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            three.add_node(num_cpus=1)
        yield three
        ray.shutdown()
        three.shutdown()


@pytest.fixture
def cells(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "CELL", "fake_worker:serve")
    found = plan_of("hac", runs=tmp_path / "runs", targets="human", methods="erm", seeds="6")
    found[0].folder.parent.mkdir(parents=True)
    return found


def submit(cluster, cells, *, watch=lambda board: None, asked=None, **more):
    more.setdefault("demands", demand(cells[0].folder.parent, []))
    engine = Ray(cluster.address, asked=asked or RaySettings(), **more)
    return launch(begin(units_of(cells), retry_failed=False), engine, watch=watch, poll=0.1)


@contextmanager
def nodes(cluster, **does: str) -> Iterator[None]:
    """Inside the block there are nodes of these names, with mounts of their own, where these commands are run first."""
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("no mounts of its own for a node here (root, Linux)")
    ray = f"{sys.executable} -m ray.scripts.scripts start --block --address={cluster.address} --num-cpus=1"
    alone = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child=TERM", "--mount-proc", "sh", "-ec"]
    begun = []
    try:
        for name, first in does.items():  # two that begin at once come into each other's way
            script = f"echo {name} > /proc/sys/kernel/hostname\n{first}\nexec {ray} --object-store-memory=80000000"
            process = subprocess.Popen([*alone, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            begun.append(process)
            said = []
            while not said or "Ray runtime started" not in said[-1]:
                said.append(process.stdout.readline())
                assert said[-1], "".join(said)
        yield
    finally:
        for process in begun:
            process.kill()
        for process in begun:
            process.communicate()


def calls(cell):
    return beside(cell.folder, "calls").read_text().splitlines()


def test_units_are_run_and_failures_are_told(cluster, cells):
    beside(cells[1].folder, "say").write_text("fail")
    beside(cells[2].folder, "say").write_text("kill")
    board = submit(cluster, cells)
    assert len(board.done) == 5
    assert board.failed == {cells[1].key: "no such clip"}
    assert [len(calls(cell)) for cell in cells] == [1, 1, 2, 1, 1, 1]


def test_a_node_that_dies_is_no_failure(cluster, cells):
    """The unit is begun again elsewhere, and what is left of its first process is no second one."""
    beside(cells[0].folder, "say").write_text("slow slow")
    node, died, places = cluster.add_node(num_cpus=2), [], {}

    def watch(board):
        if not died and state(cells[0].folder) == "running":
            died.append(True)
            cluster.remove_node(node, allow_graceful=False)
            died.append(cluster.add_node(num_cpus=2))
        elif died and len(calls(cells[0])) == 2:
            places.update(board.running)
            beside(cells[0].folder, "go").touch()

    board = submit(cluster, cells[:1], watch=watch, asked=RaySettings(processors=2))
    cluster.remove_node(died[1])
    assert [cell.key for cell in board.done] == [cells[0].key]
    assert len(calls(cells[0])) == 2
    assert places == {cells[0].key: socket.gethostname().partition(".")[0]}


def test_a_node_of_another_version_is_told_by_name_and_left_alone(cluster, cells, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text(
        "from importlib import metadata\nhere = metadata.version\n"
        "metadata.version = lambda name: '0.1' if name == 'torch' else here(name)\n"
    )
    with monkeypatch.context() as environ:
        environ.setenv("PYTHONPATH", f"{tmp_path / 'other'}{os.pathsep}{os.environ['PYTHONPATH']}")
        node = cluster.add_node(num_cpus=4)
    said = []
    board = submit(cluster, cells, say=Say(said.append))
    cluster.remove_node(node)
    assert len(board.done) == 6
    (line,) = said
    assert re.search(r"node \S+ \(\w+\) has torch 0\.1, and here it is 2\.", line)


def test_nodes_that_cannot_run_units_are_told_by_name_and_left_alone(cluster, cells, tmp_path):
    """One does not see the runs, the disk of one is full, that of one is read-only of a sudden."""
    for cell in cells[:3]:
        beside(cell.folder, "say").write_text("slow slow")
    said, runs, upper, now, then = (
        [],
        *(cells[0].folder.parent, *(tmp_path / name for name in ("upper", "now", "then"))),
    )
    upper.mkdir()
    demands = demand(runs, [])
    full = f"""mount -t tmpfs -o size=16k tmpfs {upper}
        mkdir {upper}/u {upper}/w
        head -c 1M /dev/zero > {upper}/full || true
        mount -t overlay -o lowerdir={runs},upperdir={upper}/u,workdir={upper}/w overlay {runs}"""
    ill = f"""(until [ -e {now} ]; do sleep 0.1; done
        mount --bind {runs} {runs}; mount -o remount,bind,ro {runs}; touch {then}) &"""

    def watch(board):
        if "ill" in board.running.values() and len(board.running) == 3 and not now.exists():
            now.touch()
            helpers.until(then.exists)
            for cell in cells[:3]:
                beside(cell.folder, "go").touch()

    with nodes(cluster, blind=f"mount -t tmpfs tmpfs {runs}", full=full, ill=ill):
        board = submit(cluster, cells, demands=demands, watch=watch, say=Say(said.append))
    assert not board.failed
    assert len(board.done) == 6
    for line, fault in zip(
        sorted(said),
        (
            r"blind \(\w+\) does not see the folder .*hac",
            r"full \(\w+\) cannot write into .*hac: No space left on device",
            r"ill \(\w+\) cannot write into .*hac: Read-only file system",
        ),
        strict=True,
    ):
        assert re.fullmatch(f"warning: node {fault}; nothing is run there.", line)


def test_a_node_that_joins_late_gets_units_and_one_that_lacks_something_gives_them_back(cluster, cells, tmp_path):
    """What it lacks may be mbcd itself."""
    for cell in cells[:3]:
        beside(cell.folder, "say").write_text("slow")
    said, late = [], ExitStack()
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mbcd_cli'] = None\n")
    does = {
        "bare": f"export PYTHONPATH={tmp_path}:$PYTHONPATH",
        "blind": f"mount -t tmpfs tmpfs {cells[0].folder.parent}",
    }

    def watch(board):
        assert not board.failed
        if len(board.running) == 2 and does:
            late.enter_context(nodes(cluster, **does))
            does.clear()
        elif len(said) == 2 and len(board.running) == 2 and not board.done:
            late.enter_context(nodes(cluster, late=""))
        elif "late" in board.running.values():
            for cell in cells[:3]:
                beside(cell.folder, "go").touch()

    with late:
        board = submit(cluster, cells, watch=watch, say=Say(said.append))
    assert not board.failed
    assert len(board.done) == 6
    assert [len(calls(cell)) for cell in cells] == [1] * 6
    bare, blind = sorted(said)
    assert re.search(r"node bare \(\w+\) cannot run mbcd: .*mbcd_cli.*; nothing is run there", bare)
    assert re.search(r"node blind \(\w+\) does not see the folder .*hac; nothing is run there", blind)


def test_units_share_a_gpu_or_have_it_alone_and_keep_to_the_memory_of_their_node(cluster, cells, tmp_path, request):
    """GPUs that are there by word alone; which ones those units saw that ran at the same time."""
    import ray

    node = cluster.add_node(num_cpus=6, num_gpus=2, memory=3.5 * 2**30)
    ray.init(cluster.address, log_to_driver=False)  # one connection, whose processes serve all units
    request.addfinalizer(lambda: (ray.shutdown(), cluster.remove_node(node)))
    for at, (asked, count, gpus) in enumerate(
        (
            (RaySettings(gpus=0.5), 5, ["0", "0", "1", "1"]),
            (RaySettings(gpus=1), 3, ["0", "1"]),
            (RaySettings(gpus=0.1, memory_gb=1.5), 3, ["0", "0"]),
        )
    ):
        some = plan_of("hac", runs=tmp_path / str(at), targets="human", methods="erm", seeds=str(count))
        some[0].folder.parent.mkdir(parents=True)
        for cell in some:
            beside(cell.folder, "say").write_text("slow")
        looks = []

        def watch(board, looks=looks, some=some, gpus=gpus):
            if looks.count(gpus) < 10:  # until one ends, and another begins
                begun = [cell for cell in some if cell.key in board.running and beside(cell.folder, "calls").exists()]
                looks.append(sorted(line.split()[1] for cell in begun for line in calls(cell)))
                assert len(looks[-1]) <= len(gpus)
            else:
                for cell in some:
                    beside(cell.folder, "go").touch()

        assert len(submit(cluster, some, watch=watch, gpu=True, asked=asked).done) == count


def test_what_no_node_can_do_is_one_error(cluster, cells, tmp_path):
    with pytest.raises(RunError, match=r"does not see the folder .*nowhere"):
        submit(cluster, cells, demands=demand(cells[0].folder.parent, [tmp_path / "nowhere"]))
    with pytest.raises(RunError, match="7 processors, 0 GPUs and 0 GB"):
        submit(cluster, cells, asked=RaySettings(processors=7))
    with pytest.raises(RunError, match="there is no Ray cluster"):
        Ray("127.0.0.1:9", asked=RaySettings(), demands=demand(tmp_path, []))


def test_leaving_lets_units_write_their_checkpoints(cluster, cells):
    for cell in cells[:2]:
        beside(cell.folder, "say").write_text("slow")

    def leave(board):
        if len(board.running) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(cluster, cells[:2], watch=leave)
    helpers.until(lambda: all(state(cell.folder) == "waiting" for cell in cells[:2]))
    assert len(submit(cluster, cells[:2]).done) == 2


def test_without_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match="not installed") as caught:
        Ray(None, asked=RaySettings(), demands=None)
    assert "uv sync --group ray" in caught.value.remedy


def test_a_cache_is_prepared(cluster, tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    alone = prepare(settings_for(root, tmp_path / "one", "cache.shard_clips=1"))
    settings, said = settings_for(root, tmp_path / "two", "cache.shard_clips=1"), []
    how = Launching(jobs=2, launcher="ray", ray_address=cluster.address)
    shared = prepare_launched(settings, how=how, corruptions=(), severities=(1,), say=Say(said.append))
    for name, entry in alone.modalities.items():
        assert same(contents(Path(entry.folder)), contents(Path(shared.modalities[name].folder)))
    assert sum("has ended" in line for line in said) == 2
    assert not any("failed: " in line for line in said)


def test_a_part_of_a_preparation_holds_its_gpu_to_its_end_and_loads_its_weights_once(cluster, tmp_path, request):
    """The other one begins when nothing is left, and loads none."""
    node = cluster.add_node(num_cpus=2, num_gpus=1)
    request.addfinalizer(lambda: cluster.remove_node(node))
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",), train=8)
    weights(root / "w.pth")
    loads = {}

    def note(line):
        if "has ended" in line:
            log = Path(line.rpartition("log: ")[2])
            loads[log.name] = log.read_text().count("with the weights of") if log.exists() else 0

    settings = ours(root, tmp_path / "cache", "cache.shard_clips=1", "ray.gpus=1")
    how = Launching(jobs=2, launcher="ray", ray_address=cluster.address)
    shared = prepare_launched(settings, how=how, corruptions=(), severities=(1,), say=Say(note))
    assert shared.modalities["video"].shards == 18
    assert sorted(loads.values()) == [0, 1]


@pytest.mark.stress
def test_what_a_unit_costs(cluster, tmp_path):
    print(cost(tmp_path, {"launcher": "ray", "ray_address": cluster.address}))


@pytest.mark.stress
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("show", [show_sweep, show_prepare])
def test_two_thousand_units_while_nodes_and_the_command_die(cluster, tmp_path, show):
    """All nodes but the head, without which there is no cluster."""
    nodes = [*cluster.worker_nodes, cluster.add_node(num_cpus=1)]

    def trouble(rng):
        at = rng.randrange(len(nodes))
        cluster.remove_node(nodes[at], allow_graceful=False)
        time.sleep(rng.uniform(0.2, 2))
        nodes[at] = cluster.add_node(num_cpus=1)

    print(show(tmp_path, {"launcher": "ray", "ray_address": cluster.address}, trouble=trouble))
