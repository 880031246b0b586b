"""A fault at every single call that changes the disk (pytest -m stress tests/stress/test_faults.py -s).

A preloaded library counts writes, renames, syncs, truncations, deletions and new folders below one folder, and lets
the n-th fail (the disk full, broken or read-only) or kills the process there. The same command, run once more, then
leaves the same files, and nothing that was half written. Commands run in forked children of one process that has
imported them, so that a run takes a second. EVERY_NTH=10 tries every tenth call. It needs a C compiler.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import helpers
import pytest

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.stress,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not COMPILER, reason="there is no C compiler"),
]
FAULTS = {"ENOSPC": 28, "EIO": 5, "EROFS": 30, "SIGKILL": -1}
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
static long left = -1, seen = 0;
static int fault = 0;
static char below[PATH_MAX];
void arm(const char *folder, long n, int which) {
    strncpy(below, folder, PATH_MAX - 1);
    left = n; fault = which; seen = 0;
}
long calls(void) { return seen; }
static int strikes(const char *path) {
    if (!below[0] || strncmp(path, below, strlen(below))) return 0;
    seen++;
    if (left < 0 || seen < left) return 0;
    if (fault < 0) { kill(getpid(), SIGKILL); pause(); }
    if (seen > left && fault == EIO) return 0;  /* a sector; a full or read-only disk stays so */
    errno = fault;
    return 1;
}
static int strikes_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return strikes(path);
}
#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
ssize_t write(int fd, const void *b, size_t n) {
    REAL(write); return strikes_fd(fd) ? -1 : real(fd, b, n);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) {
    REAL(pwrite); return strikes_fd(fd) ? -1 : real(fd, b, n, o);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
    REAL(pwrite64); return strikes_fd(fd) ? -1 : real(fd, b, n, o);
}
ssize_t writev(int fd, const struct iovec *v, int c) { REAL(writev); return strikes_fd(fd) ? -1 : real(fd, v, c); }
int fsync(int fd) { REAL(fsync); return strikes_fd(fd) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return strikes_fd(fd) ? -1 : real(fd); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); return strikes_fd(fd) ? -1 : real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); return strikes_fd(fd) ? -1 : real(fd, n); }
int rename(const char *a, const char *b) { REAL(rename); return strikes(b) ? -1 : real(a, b); }
int unlink(const char *a) { REAL(unlink); return fault != ENOSPC && strikes(a) ? -1 : real(a); }
int mkdir(const char *a, mode_t m) { REAL(mkdir); return strikes(a) ? -1 : real(a, m); }
"""


def serve() -> None:
    """The process that has everything imported: runs commands in forked children, as lines of standard input ask."""
    import signal as signals

    import torch
    from typer.testing import CliRunner

    from mbcd_cli.cli import app

    torch.set_num_threads(1)
    shim = ctypes.CDLL(None)
    shim.calls.restype = ctypes.c_long
    warm = os.fork()
    if warm == 0:  # what is imported late is imported in the children's parent, not in the first child alone
        os._exit(0)
    os.waitpid(warm, 0)
    for line in sys.stdin:
        words, folder, number, fault = json.loads(line)
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            signals.alarm(300)
            shim.arm(folder.encode(), ctypes.c_long(number), fault)
            result = CliRunner().invoke(app, words, prog_name="mbcd")
            shim.arm(b"", ctypes.c_long(-1), 0) if number >= 0 else None
            told = {"code": result.exit_code, "calls": shim.calls(), "said": result.stderr[-2000:]}
            os.write(sender, json.dumps(told).encode())
            os._exit(0)
        os.close(sender)
        with os.fdopen(receiver, "rb") as pipe:
            told = pipe.read()
        status = os.waitpid(child, 0)[1]
        answer = json.loads(told) if told else {"code": -os.WTERMSIG(status), "calls": 0, "said": ""}
        print(json.dumps(answer), flush=True)


class Server:
    def __init__(self, folder: Path) -> None:
        source, library = folder / "shim.c", folder / "shim.so"
        source.write_text(SHIM)
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        environ = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        environ["PYTHONPATH"] = str(Path(helpers.__file__).parent)
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True)

    def run(self, words, folder: Path, number: int = -1, fault: int = 0) -> dict:
        self.process.stdin.write(json.dumps([[str(word) for word in words], str(folder), number, fault]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("shim"))
    yield server
    server.process.stdin.close()
    server.process.wait()


SETS = [part for one in (*helpers.SMALL, "training.batch_size=4") for part in ("--set", one)]


def words_of(command: str, home: Path, out: Path) -> list[object]:
    """A command that reads `home` and writes below `out`."""
    if command == "prepare":
        return ["prepare", "manifest", "--root", home / "tiny", "--cache-dir", out, *SETS]
    if command == "train":
        there = (out / "run" / "settings.toml").exists()
        words = ["train", "--dataset", "tiny", "--target-domain", "gamma", "--cache-dir", home / "cache", "--epochs", 2]
        return [*words, "--run", out / "run", *SETS, *(["--resume"] if there else [])]
    if command == "evaluate":
        return ["evaluate", "--run", home / "run", "--output", out, "--analyses", "missing", "--export", "csv"]
    few = ["--set", "landscape.points=3", "--set", "landscape.analyses=['surface', 'curvature']"]
    few += [
        "--set",
        "landscape.eigenvalues=1",
        "--set",
        "landscape.trace_probes=1",
        "--set",
        "landscape.density_probes=1",
    ]
    return ["landscape", "--checkpoint", home / "run/checkpoints/best.pt", "--output", out, *few]


@pytest.fixture(scope="module")
def home(server, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    helpers.write_dataset(home / "tiny", domains=("alpha", "beta", "gamma"))
    for words in (words_of("prepare", home, home / "cache"), words_of("train", home, home)):
        told = server.run(words, home)
        assert told["code"] == 0, told
    return home


_LATER = ("index.h5", "prepare.toml", "timing.jsonl", "done", "results.json", "landscape.json", "report.html")
"""Files that hold a time, a path, or what was resumed."""


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder; of those that tell of the time only that they are there, of events nothing."""
    return {
        path.relative_to(folder).as_posix(): None if path.name in _LATER or path.suffix == ".pt" else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "events" not in path.parts and not path.name.startswith(".lock")
    }


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "landscape"])
def test_the_same_command_once_more_leaves_the_same_files(server, home, tmp_path, command):
    whole = tmp_path / "whole"
    whole.mkdir()
    told = server.run(words_of(command, home, whole), whole)
    assert told["code"] == 0, told
    expected, counts = contents(whole), Counter()
    every = int(os.environ.get("EVERY_NTH", "1"))
    for number in range(1, told["calls"] + 1, every):
        for name, fault in FAULTS.items():
            out = tmp_path / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            what = f"{command}, {name} at call {number}"
            struck = server.run(words_of(command, home, out), out, number, fault)
            counts[f"{name} {'told' if struck['code'] else 'survived'}"] += 1
            assert "Unexpected" not in struck["said"], f"{what}: {struck['said']}"
            assert "Traceback" not in struck["said"], f"{what}: {struck['said']}"
            assert struck["code"] in ((-signal.SIGKILL, 0) if fault < 0 else (0, 1, 3)), f"{what}: {struck}"
            again = server.run(words_of(command, home, out), out)
            finished = command == "train" and "already holds a run" in again["said"]
            assert again["code"] == 0 or finished, f"{what}, then {again}"
            now = contents(out)
            assert now.keys() == expected.keys(), f"{what}: {now.keys() ^ expected.keys()}"
            assert [key for key in now if now[key] != expected[key]] == [], what
    print(f"{command}: {told['calls']} calls, {dict(counts)}")


if __name__ == "__main__":
    serve()
