"""Two gloo processes do what one process does with the same global batch."""

from __future__ import annotations

import json
import os
import signal
import socket
import traceback
from pathlib import Path

import pytest
import torch
from fakes import MemoryDataset, memory_settings

from mbcd_cli import console
from mbcd_cli.errors import MbcdError
from mbcd_cli.files import read_records
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.training import train as command


def train(run: Path, world: int, *, resume=False, codes=None, dataset=MemoryDataset, **changes) -> list[str]:
    """Train in `world` forked processes with the variables torchrun sets; what each wrote to stdout and stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children, logs = [], []
    for rank in range(world):
        group = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        logs.append(run.parent / f"{run.name}-{rank}.log")
        child = os.fork()
        if child == 0:
            code = 70
            try:
                log = os.open(logs[-1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.environ.update({k: str(v) for k, v in group.items()})
                code = one_process(run, resume, dataset, changes)
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    status = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    texts = [log.read_text() for log in logs]
    assert status == (codes or [0] * world), texts
    return texts


def one_process(run: Path, resume: bool, dataset, changes) -> int:
    stdout, stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    console.err.file, console.out.file = stderr, stdout
    runtime = {"device": "cpu", **changes.get("runtime", {})}  # a forked process cannot begin with CUDA anew
    settings = memory_settings(**{**changes, "runtime": runtime})
    try:
        summary = command.train(settings, dataset(), run=run, resume=resume, overwrite=False, say=console.terminal)
    except MbcdError as error:
        console.say(error.message)
        return error.exit_code
    if summary is not None:
        print("steps", summary.steps, file=stdout)
    return 0


@pytest.mark.parametrize("order", ["first", "second"])
def test_two_processes_equal_one(tmp_path, order):
    """Masks, DSU and head dropout are all in use; batch norm is frozen."""
    changes = {
        "training": {"batch_norm": "frozen", "log_steps": 1, "epochs": 1 if order == "second" else 2},
        "method": {"consistency": {"order": order, "alpha": 0.3}},
        "average": {"beta": 0.9},
    }
    one, two = train(tmp_path / "one", 1, **changes), train(tmp_path / "two", 2, **changes)
    assert one[0] == two[0]
    assert f"steps {4 if order == 'second' else 8}" in one[0]
    assert two[1] == ""  # rank 1 says nothing
    assert sorted(p.name for p in (tmp_path / "two").rglob("*.pt")) == ["best.pt", "last.pt"]
    alone, shared = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("one", "two"))
    for state in ("student", "teacher"):
        for key, value in getattr(alone, state).items():
            torch.testing.assert_close(getattr(shared, state)[key], value, rtol=0, atol=1e-6, msg=f"{state} {key}")
    assert torch.equal(alone.training["global"]["torch"], shared.training["global"]["torch"])
    assert torch.equal(alone.training["randomness"], shared.training["randomness"])
    for log in ("steps.jsonl", "metrics.jsonl"):
        for mine, theirs in zip(*(read_records(tmp_path / name / log) for name in ("one", "two")), strict=True):
            close(mine, theirs)
    assert json.loads((tmp_path / "two/done").read_text())["processes"] == 2


@pytest.mark.parametrize(("method", "told"), [("jat", {"fused_hidden": 8}), ("nel", {})])
def test_own_modules_and_two_views_in_two_processes(tmp_path, method, told):
    """Discriminators, feature noise and modality dropout; both views of a clip in one process."""
    changes = {
        "training": {"batch_norm": "frozen", "log_steps": 1, "epochs": 1},
        "method": {"name": method, "hidden": 8, **told},
        "average": {"kind": "ema"},
    }
    train(tmp_path / "one", 1, **changes)
    train(tmp_path / "two", 2, **changes)
    alone, shared = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("one", "two"))
    own = alone.training["method"], shared.training["method"]
    for one, two in (own, (alone.student, shared.student), (alone.teacher, shared.teacher)):
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    for log in ("steps.jsonl", "metrics.jsonl"):
        for mine, theirs in zip(*(read_records(tmp_path / name / log) for name in ("one", "two")), strict=True):
            close(mine, theirs)


def test_a_batch_too_small_for_own_batch_norms_is_refused_by_all(tmp_path):
    changes = {"training": {"batch_size": 2}, "method": {"name": "simmmdg", "hidden": 8}}
    answers = train(tmp_path / "run", 2, codes=[1, 1], **changes)
    assert "need 2 clips in every process; batches of 2, shared by 2 processes, have fewer" in answers[0]


def close(one, two) -> None:
    """Nested records agree to 1e-5."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            close(one[key], two[key])
    elif isinstance(one, float):
        assert one == pytest.approx(two, abs=1e-5)
    else:
        assert one == two


class Interrupted(MemoryDataset):
    """Rank 1 gets SIGTERM in the first epoch."""

    def batches(self, clips, **options):
        for number, batch in enumerate(super().batches(clips, **options)):
            if options["training"] and options["epoch"] == 0 and number == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def test_a_signal_to_one_process_stops_all_with_one_checkpoint(tmp_path):
    changes = {"training": {"batch_norm": "tracked"}, "runtime": {"prefetch": 0}}
    answers = train(tmp_path / "run", 2, dataset=Interrupted, codes=[1, 1], **changes)
    assert "Stopped by SIGTERM" in answers[0]
    assert answers[1] == ""
    saved = load_checkpoint(tmp_path / "run/checkpoints/last.pt")
    assert 0 < saved.step < 8
    train(tmp_path / "run", 2, resume=True, **changes)
    train(tmp_path / "whole", 2, **changes)
    one, two = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("run", "whole"))
    for key, value in two.student.items():
        assert torch.equal(one.student[key], value), key


def test_an_error_of_rank_0_ends_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    answers = train(tmp_path / "run", 2, codes=[1, 1])
    assert "no run folder" in answers[0]
    assert answers[1] == ""
