"""Which process this is, waiting for the others, and what they exchange: real processes, over gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mbcd_cli import processes
from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.place import Place, this_process
from mbcd_cli.processes import ALONE, wait_for

ROOT = Path(__file__).parents[1]


def test_places():
    assert this_process({}) == this_process({"WORLD_SIZE": "1"}) == this_process({"RANK": "0"}) == Place(0, 1)
    assert this_process({"RANK": "", "WORLD_SIZE": ""}) == Place()
    assert this_process({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Place(3, 4, 1)
    assert Place().main
    assert not Place(1, 2).main


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK is not set"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'"),
        ({"RANK": "abc"}, "RANK is 'abc'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "1"}, "RANK is 1, and WORLD_SIZE is not set"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4, and WORLD_SIZE is 4"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0, and WORLD_SIZE is 0"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ],
)
def test_variables_left_over_from_something_else(left, said):
    with pytest.raises(SettingsError, match=said) as caught:
        this_process(left)
    assert "unset RANK, WORLD_SIZE" in caught.value.remedy


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "2"}, {"RANK": "abc"}])
def test_the_command_line_says_so_too(tmp_path, left):
    command = [sys.executable, "-m", "mbcd_cli", "prepare", "manifest", "--root", str(tmp_path), "--json"]
    (tmp_path / "manifest.csv").write_text("id,domain,split,label,label_name,audio\na,b,train,0,c,a.wav\n")
    (tmp_path / "a.wav").write_bytes(b"")
    done = subprocess.run(
        command, env={**os.environ, **left}, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"environment variable {next(iter(left))} is" in done.stderr
    assert '"remedy": "Start the processes with torchrun' in done.stdout


def test_every_piece_has_one_owner():
    assert [Place(rank, 3).share(list(range(7))) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert Place(1, 2).share(np.arange(6).reshape(3, 2)).tolist() == [[2, 3]]


class Clock:
    """Time that passes while one waits."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(processes.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(processes.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_waiting_goes_on_while_others_get_on(monkeypatch):
    clock, told = Clock(monkeypatch), []

    def missing():
        return list(range(int(clock.now // 9), 6))  # one is done every 9 s

    wait_for(missing, named=str, say=lambda text: told.append((round(clock.now), text)), patience=10, remedy="")
    assert told == [(10, "Waiting for [1, 2, 3, 4, 5]."), (30, "Waiting for [3, 4, 5].")]
    assert 53 < clock.now < 56


def test_waiting_ends_when_they_do_not(monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(RunError, match=r"Waited 3 s for \[2, 5\] in vain") as caught:
        wait_for(lambda: [2, 5], named=str, say=pytest.fail, patience=3, remedy="Begin again.")
    assert caught.value.remedy == "Begin again."
    assert 3 < clock.now < 4


def test_alone_nothing_is_exchanged():
    rows = object()
    assert ALONE.own(rows) is ALONE.gather(rows) is ALONE.sum_(rows) is rows
    assert ALONE.largest(3, 1) == [3, 1]
    assert ALONE.gathered("x") == ["x"]
    assert ALONE.on_main(lambda: 7) == 7
    ALONE.barrier()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(code: str, rank: int, world: int, port: int, **environ: str) -> subprocess.Popen:
    """`code` as one process of a job, after what every test needs."""
    begin = f"""
import sys, torch
from mbcd_cli import processes
torch.set_num_threads(1)
def say(text): print(text, flush=True)
processes._TELL = {environ.pop("tell", "10")}
"""
    place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in place.items()}, **environ}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", begin + code], env=environment, **pipes)


_EXCHANGE = """
with processes.joined(torch.device("cpu"), say=say) as group:
    own = torch.arange(3.0) + 10 * group.rank
    own.requires_grad_()
    everyones = group.gather(own)
    (everyones * torch.arange(6.0)).sum().backward()
    averaged = group.average([torch.full([2], float(group.rank))])[0].tolist()
    place = [torch.full([2], float(group.rank)), torch.full([1], 4.0 * group.rank, dtype=torch.float64)]
    group.average_(place)
    made = group.on_main(lambda: "made")
    group.barrier()
    say(repr((everyones.tolist(), own.grad.tolist(), averaged, [p.tolist() for p in place],
        group.sum_(torch.tensor([group.rank + 1])).tolist(), group.own(torch.arange(4)).tolist(),
        group.largest(group.rank, -group.rank), group.gathered(group.rank), made)))
"""


def test_two_processes_exchange():
    port = free_port()
    jobs = [start(_EXCHANGE, rank, 2, port) for rank in (0, 1)]
    answers = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], answers
    for rank, (said, _) in enumerate(answers):
        everyones, gradient, averaged, place, total, own, largest, gathered, made = eval(said)
        assert everyones == [0, 1, 2, 10, 11, 12]
        assert gradient == [[0, 2, 4], [6, 8, 10]][rank]  # the losses of both processes depend on these rows
        assert averaged == [0.5, 0.5]
        assert place == [[0.5, 0.5], [2.0]]
        assert total == [3]
        assert own == [[0, 1], [2, 3]][rank]
        assert largest == [1, 0]
        assert gathered == [0, 1]
        assert made == ["made", None][rank]


_MEETS = """
with processes.joined(torch.device("cpu"), say=say) as group:
    say("met")
"""


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGINT), (0, signal.SIGTERM)])
def test_a_process_that_waits_says_for_whom_and_can_be_stopped(rank, number):
    """RANK, WORLD_SIZE and MASTER_ADDR left over from another job: nobody else comes."""
    job = start(_MEETS, rank, 2, port := free_port(), tell="0.2")
    assert job.stdout.readline() == f"Waiting for process {1 - rank} of 2 at 127.0.0.1:{port}.\n"
    job.send_signal(number)
    _, trouble = job.communicate(timeout=10)
    assert job.returncode == -number, trouble


def test_only_those_who_are_missing_are_named():
    port = free_port()
    jobs = [start(_MEETS, 0, 3, port, tell="0.2"), start(_MEETS, 2, 3, port)]
    line = ""
    while "process 1 of 3" not in line:
        line = jobs[0].stdout.readline()
        assert line.startswith("Waiting for process 1"), line
    jobs.append(start(_MEETS, 1, 3, port))
    answers = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], answers
    assert all(said.endswith("met\n") for said, _ in answers)


def test_patience_ends_in_one_error():
    code = _MEETS.replace("say=say", "say=say, patience=0.5")
    _, trouble = start(code, 0, 2, free_port()).communicate(timeout=60)
    assert "RunError: Waited 0 s for process 1 of 2 at 127.0.0.1" in trouble


def test_no_address_is_one_error():
    job = start(_MEETS, 0, 2, free_port(), MASTER_ADDR="")
    assert "SettingsError: WORLD_SIZE is 2, and MASTER_ADDR and MASTER_PORT do not name" in job.communicate()[1]


_WAITS = """
with processes.joined(torch.device("cpu"), say=say) as group:
    say("met")
    if group.main:
        sys.stdin.read()
        say("read")
    group.barrier()
    say("left")
"""


def test_a_barrier_answers_a_signal():
    port = free_port()
    jobs = [start(_WAITS, rank, 2, port) for rank in (0, 1)]
    assert [job.stdout.readline() for job in jobs] == ["met\n", "met\n"]
    jobs[1].send_signal(signal.SIGINT)
    said, trouble = jobs[1].communicate(timeout=20)
    assert "KeyboardInterrupt" in trouble
    assert said == ""
    said, trouble = jobs[0].communicate("", timeout=60)
    assert said == "read\n"  # and then an error, since nobody is left to meet
    assert jobs[0].returncode != 0


def test_torchrun_starts_them():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*torchrun, "-m", "test_processes"], env=environment, stdout=subprocess.PIPE, text=True)
    assert sorted(job.communicate(timeout=120)[0].split()) == ["[0,1]", "[0,1]"]
    assert job.returncode == 0


if __name__ == "__main__":  # what torchrun starts
    import torch

    with processes.joined(torch.device("cpu"), say=print) as group:
        print(str(group.gathered(group.local)).replace(" ", "") + "\n", end="", flush=True)
