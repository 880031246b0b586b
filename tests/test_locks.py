"""One lock for all rooms: it goes with its process, also where the file system has none."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
from pathlib import Path

import filelock
import pytest
from helpers import run, until, without_flock

from mbcd_cli import locks
from mbcd_cli.errors import FileError
from mbcd_cli.files import open_hdf5, written
from mbcd_cli.locks import folder_aside, held, lock

_HOLDS = """
import sys
from pathlib import Path
from mbcd_cli.locks import lock
held = lock(Path(sys.argv[1]))
print("nothing" if held is None else "held", flush=True)
sys.stdin.read()
"""


def _no_locks(number=errno.ENOLCK):
    """In place of `flock`."""

    def none(handle, kind):
        raise OSError(number, "no locks here")

    return none


@pytest.mark.parametrize("number", [None, errno.ENOLCK, errno.EOPNOTSUPP, 524])
def test_a_lock_goes_with_its_process(tmp_path, monkeypatch, number):
    path = tmp_path / "folder" / ".lock"
    environ = {}
    if number is not None:
        environ = without_flock(tmp_path, number)
        monkeypatch.setattr(fcntl, "flock", _no_locks(number))
    assert not held(path)
    process = run(_HOLDS, path, **environ)
    assert process.stdout.readline() == "held\n"
    assert held(path)
    assert lock(path) is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not held(path)
    with lock(path) as mine:
        other = run(_HOLDS, path, **environ)
        assert other.communicate("")[0] == "nothing\n"
    assert mine.closed
    assert [file.name for file in path.parent.iterdir()] == [".lock"]
    with folder_aside(tmp_path / "made") as aside:
        assert aside.is_dir()
        with written(aside / "x.h5") as partial, open_hdf5(partial, "w") as file:
            file["x"] = 3
    assert not list(tmp_path.glob(".made*"))


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_on_the_new_one(tmp_path, monkeypatch):
    """Who held it before removes the file between our opening and our locking it."""
    path = tmp_path / "journal"
    path.touch()
    flock = fcntl.flock

    def removed(handle, kind):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", removed)
    with lock(path) as mine:
        assert os.path.samestat(os.fstat(mine.fileno()), path.stat())
        assert held(path)


def test_who_looks_whether_a_lock_is_held_keeps_nobody_from_it(tmp_path, monkeypatch):
    path, flock = tmp_path / ".lock", fcntl.flock
    path.touch()
    looks = path.open("rb")
    flock(looks, fcntl.LOCK_SH)

    def looked(handle, kind):
        try:
            flock(handle, kind)
        except BlockingIOError:
            looks.close()
            raise

    monkeypatch.setattr(fcntl, "flock", looked)
    with lock(path) as mine:
        assert mine is not None
        assert held(path)
        assert lock(path) is None


def test_other_answers_to_flock_are_errors(tmp_path, monkeypatch):
    def broken(handle, kind):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(FileError, match="Input/output error"):
        lock(tmp_path / ".lock")
    opened = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileError, match="Input/output error"), folder_aside(tmp_path / "made"):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_what_is_written_to_a_lock_file_is_there_whole_or_the_full_disk_is_told(tmp_path):
    """A limit on the size of files stands for the full disk: what fits of a write is taken without a word."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with lock(tmp_path / "ledger.jsonl") as file:
        file.write(b"line\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(OSError, match=r"File too large: .*ledger\.jsonl"):
                file.write(bytes(200))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _elsewhere(holder: Path) -> None:
    """The process that holds it is one of another host."""
    holder.write_text(holder.read_text().replace(f"host={filelock.SoftFileLease(holder).owner.hostname}", "host=other"))


def test_without_locks_what_died_on_another_host_is_free_by_and_by(tmp_path, monkeypatch):
    """Asked about once: each question by itself has to see that it stands still."""
    path, environ = tmp_path / ".lock", without_flock(tmp_path, errno.ENOLCK)
    process = run(_STANDS_STILL, path, "0.3", **environ)
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    holder = tmp_path / ".lock.holder"
    _elsewhere(holder)
    monkeypatch.setattr(locks, "_LEASE", 0.3)
    monkeypatch.setattr(fcntl, "flock", _no_locks())
    os.utime(holder, (0, 0))
    with lock(path) as mine:
        assert mine is not None
        _elsewhere(holder)
        assert lock(path) is None, "it is touched"


def test_without_locks_who_looks_keeps_nobody_from_it(tmp_path, monkeypatch):
    """A look has to take it, for a moment."""
    path = tmp_path / ".lock"
    path.touch()
    monkeypatch.setattr(fcntl, "flock", _no_locks())
    looks = filelock.SoftFileLease(tmp_path / ".lock.holder", timeout=0, lease_duration=locks._LEASE)
    looks.acquire()
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: looks.release())
    with lock(path) as mine:
        assert mine is not None


_STANDS_STILL = """
import sys, time
from pathlib import Path
from mbcd_cli import locks
locks._LEASE = float(sys.argv[2])
held = locks.lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_without_locks_who_stands_still_loses_it_and_ends(tmp_path, monkeypatch):
    """As seen from another host, where nobody can look whether the process lives."""
    path, environ = tmp_path / ".lock", without_flock(tmp_path, errno.ENOLCK)
    process = run(_STANDS_STILL, path, "0.6", **environ)
    assert process.stdout.readline() == "held\n"
    holder = tmp_path / ".lock.holder"
    _elsewhere(holder)
    (lease,) = [filelock.SoftFileLease(holder, timeout=0, lease_duration=0.6)]
    with pytest.raises(filelock.Timeout):
        lease.acquire()
    process.send_signal(signal.SIGSTOP)

    def taken():
        try:
            return lease.acquire()
        except filelock.Timeout:
            return None

    until(taken)
    process.send_signal(signal.SIGCONT)
    assert "another one has taken its lock" in process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert holder.suffix == locks.HOLDER
