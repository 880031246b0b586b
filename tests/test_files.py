"""Files that a kill, a full disk, a second process or a file system without locks leaves whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import run

from mbcd_cli import files
from mbcd_cli.errors import FileError
from mbcd_cli.locks import lock

# ---- written aside


def test_a_file_appears_whole_and_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.written(path) as aside:
        aside.write_text("one")
        assert not path.exists()
        assert files.is_partial(aside)
        assert files.is_partial(aside, "file.txt")
        assert not files.is_partial(aside, "file")
    assert path.read_text() == "one"
    files.write_text(path, "two")
    assert (path.read_text(), list(path.parent.iterdir())) == ("two", [path])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = files.write_text(tmp_path / "file", "old")

    def fail(aside):
        aside.write_text("new")
        raise error

    with pytest.raises(error), files.written(path) as aside:
        fail(aside)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])


def test_file_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: done.append("rename") or replace(self, to))
    files.write_text(tmp_path / "file", "x")
    files.remove(tmp_path / "file", tmp_path / "none")
    aside = tmp_path / f".file.{files._HOST}.{os.getpid()}.partial"
    assert done == [str(aside), "rename", str(tmp_path), str(tmp_path)]
    assert not list(tmp_path.iterdir())


def test_files_that_wait_for_the_disk_together_have_their_names_when_all_have(tmp_path, monkeypatch):
    """Of a folder in which one fails, those before it alone: what follows may speak of it."""
    fsync, done = os.fsync, []
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    names = ("log", "best", "last")
    for folder in (whole, broken):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("before")

    def failing(handle):
        done.append(Path(f"/proc/self/fd/{handle}").readlink())
        if done[-1].parent == broken and ".best." in done[-1].name:
            raise OSError(errno.EIO, "no answer")
        fsync(handle)

    def texts(folder):
        return [(folder / name).read_text() for name in names]

    monkeypatch.setattr(os, "fsync", failing)
    with files.synced_at_once([whole, broken]) as failed:
        for folder in (whole, broken):
            files.sync(folder / "log")
            for name, text in (("best", "first"), ("best", "second"), ("last", "second")):
                files.write_text(folder / name, text, place="--run")
        assert (texts(whole), done) == (["before"] * 3, [])
    assert (texts(whole), texts(broken)) == (["before", "second", "second"], ["before"] * 3)
    assert sorted(tmp_path.rglob("*")) == sorted([whole, broken, *(f / n for f in (whole, broken) for n in names)])
    assert (len(done), done[-1]) == (7, whole)
    assert [(folder, "--run" in error.remedy) for folder, error in failed.items()] == [(broken, True)]
    files.write_text(whole / "last", "alone")
    assert done[-1] == whole, "after the block each waits by itself"


def test_a_file_that_is_written_over_while_it_waits_never_has_its_name_half_written(tmp_path):
    """A checkpoint at the end of an epoch, and one more since a signal came, which the full disk does not take."""
    path = files.write_text(tmp_path / "last", "before")

    def fails(aside):
        aside.write_text("hal")
        raise OSError(errno.ENOSPC, "No space left on device")

    with files.synced_at_once([tmp_path]):
        files.write_text(path, "whole")
        with pytest.raises(FileError, match="The disk is full"), files.written(path) as aside:
            fails(aside)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("before", [path])


_KILLED = """
import sys
from pathlib import Path
from mbcd_cli import files
with files.written(Path(sys.argv[1])) as aside:
    aside.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_who_writes_clears_what_the_dead_left_in_the_folder_and_who_deletes_what_is_of_the_file(tmp_path, monkeypatch):
    dead, ended = run(""), run("")
    dead.wait()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked about it
    here = files._HOST
    left = [tmp_path / f".file.{here}.{pid}.partial" for pid in (dead.pid, ended.pid, os.getppid())]
    others = [tmp_path / f".another.{here}.{dead.pid}.partial", tmp_path / f".file.elsewhere.{dead.pid}.partial"]
    for path in (*left, *others):
        path.touch()
    files.delete(tmp_path / "file")
    assert [path.exists() for path in (*left, *others)] == [False, False, True, True, True]
    files.write_text(tmp_path / "file", "x")
    assert [path.exists() for path in (*left, *others)] == [False, False, True, False, True]
    monkeypatch.setattr(files, "remove_partial", None)  # a folder of many runs is looked through once
    files.write_text(tmp_path / "other", "x")


_CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
_ISOLATES = shutil.which("unshare") and not subprocess.run([*_CONTAINER, "true"], capture_output=True).returncode


@pytest.mark.skipif(not _ISOLATES, reason="no process namespaces here")
def test_a_container_of_the_same_host_name_is_another_host(tmp_path):
    """The number of a process of ours is nobody's there."""
    with files.written(tmp_path / "ours") as aside:
        aside.write_text("x")
        command = "import sys; from pathlib import Path; from mbcd_cli import files; files.tidy(Path(sys.argv[1]))"
        subprocess.run([*_CONTAINER, sys.executable, "-c", command, tmp_path], check=True)
    assert (tmp_path / "ours").exists()


def test_a_file_that_need_not_last_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sync", None)
    assert files.write_text(tmp_path / "file", "x", lasting=False).read_text() == "x"


def test_a_table_spells_out_names_that_are_no_text(tmp_path):
    files.write_table(tmp_path / "table.csv", ["path"], [["a\udcff"]])
    assert (tmp_path / "table.csv").read_text() == "path\na\\udcff\n"


def test_a_write_that_fails_once_inside_hdf5_is_told(tmp_path):
    """HDF5 drops some errors, and would go on: the file would have a hole."""
    old = files.write_text(tmp_path / "file.h5", "old").read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        with files.written_hdf5(tmp_path / "file.h5") as file:
            file["x"] = np.arange(10)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
            try:
                file["y"] = np.zeros(1 << 17)
                file.flush()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            file["z"] = np.arange(10)

    with pytest.raises(FileError, match="cannot be written"):
        write()
    assert (tmp_path / "file.h5").read_text() == old
    assert len(list(tmp_path.iterdir())) == 1


def test_kill_9_leaves_the_old_file_and_a_rest_that_its_owner_removes(tmp_path):
    path = files.write_text(tmp_path / "file", "old")
    process = run(_KILLED, path)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.read_text() == "old"
    (rest,) = [one for one in tmp_path.iterdir() if files.is_partial(one, "file")]
    files.remove_partial(tmp_path, of="other")
    files.remove_partial(tmp_path, ours=lambda one: one != rest)
    assert rest.exists()
    files.remove_partial(tmp_path, of="file")
    assert list(tmp_path.iterdir()) == [path]


# A limit on the size of files stands for the full disk: HDF5 and torch tell both by errors of their own.
_FULL = """
import resource, signal, sys
from pathlib import Path
import h5py, numpy, torch
from mbcd_cli import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path, how = Path(sys.argv[1]), sys.argv[2]
texts = [str(number) * 200 for number in range(5000)]
try:
    if how == "hdf5":
        with files.written_hdf5(path) as file:
            file["x"] = numpy.zeros(1_000_000)
    elif how == "texts":  # HDF5 reads what it has written: from a file with a hole it took whatever memory held
        with files.written_hdf5(path, libver="latest") as file:
            kept = file.create_dataset("x", len(texts), h5py.string_dtype())
            for first in range(0, len(texts), 100):
                kept[first : first + 100] = texts[first : first + 100]
            if [one.decode() for one in kept] == texts:
                print("as written", file=sys.stderr)
    else:
        with files.written_file(path) as file:
            torch.save(torch.zeros(1_000_000), file)
except files.FileError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["hdf5", "texts", "torch"])
def test_a_file_that_does_not_fit_is_one_message_whoever_writes_it(tmp_path, how):
    path = files.write_text(tmp_path / "file", "old")
    said, trouble = run(_FULL, path, how).communicate(timeout=60)
    assert said.startswith(f"{path} cannot be written: {os.strerror(errno.EFBIG)}."), trouble
    assert ("as written" in trouble) == (how == "texts")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])


@pytest.mark.parametrize(
    ("number", "message", "remedy"),
    [
        (errno.ENOSPC, "The disk is full: {} cannot be written.", "Free some space"),
        (errno.EDQUOT, "The disk is full: {} cannot be written.", "Free some space"),
        (errno.EROFS, "{} cannot be written: the file system can only be read.", "Name another folder"),
        (errno.EACCES, "{} cannot be written: this user may not.", "Name another folder"),
        (errno.EIO, "{} cannot be written: Input/output error.", "Name another folder"),
    ],
)
def test_what_is_wrong_and_what_to_do(tmp_path, number, message, remedy):
    path = tmp_path / "file"
    with pytest.raises(FileError) as caught, files.written(path, place="--run", then="resume"):
        raise OSError(number, os.strerror(number))
    assert caught.value.message == message.format(path)
    assert caught.value.remedy.startswith(remedy)
    assert "--run" in caught.value.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights(tmp_path):
    tmp_path.chmod(0o500)
    for action in (files.write_text, lock):
        with pytest.raises(FileError, match="this user may not"):
            action(tmp_path / "file", *["x"] * (action is files.write_text))
    tmp_path.chmod(0o700)


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for action in (lambda path: files.write_text(path, "x"), lock):
        with pytest.raises(FileError, match="cannot be written"):
            action(tmp_path / "file" / "inside")


# ---- lines of JSON, nested settings


def test_records(tmp_path):
    log = tmp_path / "log.jsonl"
    assert files.read_records(log) == []
    for step in (1, 2):
        files.append_record(log, {"step": step, "name": "\u2028é"})
    with log.open("a") as file:
        file.write('{"st')  # a kill
    assert [record["step"] for record in files.read_records(log)] == [1, 2]
    files.append_record(log, {"step": 3})
    assert log.read_text().count("\n") == 3
    assert [record["step"] for record in files.read_records(log)] == [1, 2, 3]
    log.write_text('{"st')
    files.append_record(log, {"step": 4})
    assert files.read_records(log) == [{"step": 4}]
    log.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(FileError, match="line 2"):
        files.read_records(log)
    with pytest.raises(ValueError, match="JSON compliant"):
        files.append_record(log, {"loss": float("nan")})
    with pytest.raises(FileError, match="cannot be written"):
        files.append_record(tmp_path, {"step": 1})


def test_json_is_the_same_text_for_the_same_value(tmp_path):
    one = files.write_json(tmp_path / "one", {"x": 1, "y": 2})
    two = files.write_json(tmp_path / "two", {"y": 2, "x": 1})
    assert one.read_bytes() == two.read_bytes()
    assert files.read_json(one) == {"x": 1, "y": 2}
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(one, {"x": float("nan")})
    assert files.read_json(one) == {"x": 1, "y": 2}
    assert json.loads(one.read_text()).keys() == {"x", "y", "checksum"}


def test_flatten():
    assert files.flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [{"f": 2}]}) == {"a.b.c": 1, "e": [{"f": 2}]}


def test_hdf5_files_are_those_that_h5py_writes(tmp_path):
    for path, opened in ((tmp_path / "ours", files.open_hdf5), (tmp_path / "theirs", h5py.File)):
        with opened(path, "w", libver="latest") as file:
            file["x"] = np.arange(1000.0)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
