"""Decoding in workers: one that crashes, stalls, is killed or cannot begin costs its clip at most; none is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import decoders
import helpers
import pytest

from mbcd_cli.data.media import decoding
from mbcd_cli.data.records import Clip, Media
from mbcd_cli.errors import RunError


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return helpers.write_dataset(tmp_path_factory.mktemp("media") / "tiny")


def numbered(count: int, folder: Path = Path()) -> list[tuple[int, Clip, list[int]]]:
    """What a decoder is asked for: clips c0, c1, ..., a view of each."""
    return [(i, Clip(f"c{i}", "d", "train", 0, "", {"m": Media(folder / f"f{i}")}), [0]) for i in range(count)]


JOB = decoding.DecodeJob("m", None, None, 0)


def test_a_crashing_decoder_costs_only_its_own_clips(monkeypatch):
    monkeypatch.setattr(decoding, "decode", decoders.crash)
    with decoding.Decoder(workers=2, job=JOB) as decoder:
        results = list(decoder.run(numbered(9)))
    assert [r.index for r in results] == list(range(9))
    assert {r.index for r in results if r.rejected} == {2, 5}
    assert all("crashed" in r.rejected.cause for r in results if r.rejected)


def test_a_stalled_decoder_costs_only_its_own_clip(monkeypatch):
    monkeypatch.setattr(decoding, "decode", decoders.stall)
    monkeypatch.setattr(decoding, "patience", lambda clip, name: 0.5 if clip.id == "c1" else 300.0)
    with decoding.Decoder(workers=2, job=JOB) as decoder:
        results = list(decoder.run(numbered(4)))
    assert [r.index for r in results if r.rejected] == [1]
    assert "did not finish within" in results[1].rejected.cause


def test_a_worker_has_the_time_that_its_decoder_gives_itself(monkeypatch, tmp_path):
    """What many pixels may take is known to the decoder, not to who waits for it."""
    real, clock = decoding.wait, SimpleNamespace(now=0.0)
    monkeypatch.setattr(decoding, "decode", decoders.granted)
    monkeypatch.setattr(decoding, "patience", lambda clip, name: 50.0 if clip.id == "c1" else 300.0)
    monkeypatch.setattr(decoding, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=time.sleep))
    monkeypatch.setattr(decoding.Decoder, "_lose", lambda *_: pytest.fail("it was given up"))
    with decoding.Decoder(workers=2, job=JOB) as decoder:

        def wait(connections, timeout=None):
            """Once c1's decoder has said what it may take, more than `patience` has gone by and it has not answered."""
            if clock.now or not any(worker.granted > 60 for worker in decoder._team):
                return real(connections, timeout)  # 0 where all is heard already
            clock.now = 60.0
            (tmp_path / "f1.go").touch()
            return []

        monkeypatch.setattr(decoding, "wait", wait)
        assert [r.rejected for r in decoder.run(numbered(4, tmp_path))] == [None] * 4
    assert clock.now


def test_workers_killed_in_the_midst_of_an_answer_cost_nothing(monkeypatch, tmp_path):
    """The pipe of a dead worker ends, whatever part of an answer stands in it; the clip is decoded once more."""
    monkeypatch.setattr(decoding, "decode", decoders.large)
    with decoding.Decoder(workers=2, job=JOB) as decoder:
        stream = decoder.run(numbered(6, tmp_path))
        results = [next(stream)]
        for number in (1, 2):
            helpers.until((tmp_path / f"f{number}.sent").exists)
        for worker in multiprocessing.active_children():
            worker.kill()
        results += stream
    assert [r.rejected for r in results] == [None] * 6
    assert [(r.index, r.parts[0][0][-1]) for r in results] == [(i, i) for i in range(6)]


def test_a_worker_that_dies_before_it_has_a_clip_in_its_hands_is_not_held_against_the_clip(monkeypatch, tmp_path):
    """c2 takes its worker down, and is then handed to one that has died as well, which was not heard yet."""
    real = decoding.wait
    monkeypatch.setattr(decoding, "wait", lambda connections, timeout=None: real(connections, timeout)[:1])
    monkeypatch.setattr(decoding, "decode", decoders.once)
    with decoding.Decoder(workers=2, job=JOB) as decoder:
        stream = decoder.run(numbered(3, tmp_path))
        results = [next(stream), next(stream)]
        at_work, idle = sorted(decoder._team, key=lambda worker: -len(worker.tasks))
        assert not idle.tasks
        idle.process.kill()
        real([idle.process.sentinel])
        (tmp_path / "f2.go").touch()
        real([at_work.process.sentinel])
        decoder._team.sort(key=lambda worker: worker is idle)
        results += stream
    assert [r.rejected for r in results] == [None] * 3


def test_a_killed_fork_server_costs_nothing(monkeypatch):
    monkeypatch.setattr(decoding, "decode", decoders.crash)
    with decoding.Decoder(workers=2, job=JOB) as decoder:
        stream = decoder.run(numbered(9))
        results = [next(stream)]
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        results += stream
    assert {r.index for r in results if r.rejected} == {2, 5}


def test_workers_that_cannot_begin_are_one_message(monkeypatch):
    monkeypatch.setattr(decoding, "_serve", decoders.no_worker)
    with decoding.Decoder(workers=2, job=JOB) as decoder, pytest.raises(RunError, match="ended before they began"):
        list(decoder.run(numbered(2)))


@pytest.mark.parametrize(
    ("how", "when"),
    [(signal.SIGTERM, "at work"), (signal.SIGKILL, "at work"), (signal.SIGKILL, "the fork server begins")],
)
def test_no_process_block_or_temporary_file_outlives_a_killed_prepare(root, tmp_path, how, when):
    """Decoding workers, the fork server and their blocks of shared memory go with the command, however it ends."""
    command = [sys.executable, "-m", "mbcd_cli", "prepare", "manifest", "--root", str(root), "--workers", "2"]
    command += ["--cache-dir", str(tmp_path / "cache"), *(f"--set={one}" for one in helpers.SMALL[:-2])]
    command += ["--set=cache.shard_clips=1", "--set=cache.views=400"]
    temporary = Path(tempfile.mkdtemp())  # a short path: of a long one the socket lies elsewhere
    said = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environ = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, **said, env=environ, start_new_session=True)
    session = process.pid
    if when == "at work":
        helpers.until(lambda: list(tmp_path.rglob("shard-00001.h5")), process)
        assert len(members(session)) >= 4  # the command, the fork server and two workers
    else:
        helpers.until(lambda: any("forkserver" in line for line in members(session)), process)
    process.send_signal(how)
    process.wait(timeout=60)
    helpers.until(lambda: not members(session))
    assert not list(temporary.glob("pymp-*"))
    shutil.rmtree(temporary)


def test_a_folder_of_temporary_files_whose_path_is_too_long_for_a_socket(root, tmp_path):
    (long := tmp_path / ("t" * 100)).mkdir()
    command = [sys.executable, "-m", "mbcd_cli", "prepare", "manifest", "--root", str(root), "--workers", "1"]
    command += ["--cache-dir", str(tmp_path / "cache"), *(f"--set={one}" for one in helpers.SMALL[:-2])]
    environ = {**os.environ, "TMPDIR": str(long)}
    told = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def members(session: int) -> list[str]:
    """Command lines of the live processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(stat.with_name("cmdline").read_text())
    return found
