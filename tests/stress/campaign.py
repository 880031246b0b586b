"""Commands run a thousand times over, in forked children of one process that has all imports done.

That process (`python campaign.py`) reads one run a line, tells the child's number, and, once the child has ended and
10 s or less later nothing is left that it has started, how it ended. It is the reaper of all that its children leave.
A preloaded library counts the calls that change the disk below one folder and lets the n-th fail or kills there.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

COMPILER = shutil.which("cc") or shutil.which("gcc")
GRACE = float(os.environ.get("GRACE", "10"))
"""Seconds after which nothing that a command has started is there any more; a busy machine needs more."""
_LONGEST = 300
"""Seconds after which a command is taken to wait for ever."""
_SUBREAPER = 36
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
static long at = -1, none = 0, *seen = &none;  /* counted together with the processes that are forked */
static int fault = 0;
static char below[PATH_MAX], nothing[PATH_MAX + 64], *told = nothing;
void arm(const char *folder, long n, int which) {
    if (seen == &none) {
        seen = mmap(0, sizeof *seen + sizeof nothing, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        told = (char *) (seen + 1);
    }
    strncpy(below, folder, PATH_MAX - 1);
    at = n; fault = which; *seen = 0;
}
void disarm(void) { below[0] = 0; }
long calls(void) { return *seen; }
const char *struck(void) { return told; }
static int strikes(const char *what, const char *path) {
    if (!below[0] || strncmp(path, below, strlen(below))) return 0;
    long now = __sync_add_and_fetch(seen, 1);
    if (at < 0 || now < at) return 0;
    if (now == at) snprintf(told, sizeof nothing, "%s %s", what, path);
    if (fault < 0) { kill(getpid(), SIGKILL); pause(); }
    if (now > at && fault == EIO) return 0;  /* a sector; a full or read-only disk stays so */
    if (fault == ENOSPC && (!strncmp(what, "unlink", 6) || !strcmp(what, "rmdir"))) return 0;
    errno = fault;
    return 1;
}
static int strikes_fd(const char *what, int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return strikes(what, path);
}
static int strikes_at(const char *what, int dir, const char *name) {
    char link[64], path[2 * PATH_MAX];
    if (name[0] == '/' || dir == AT_FDCWD) return strikes(what, name);
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t n = readlink(link, path, PATH_MAX - 2);
    if (n < 0) return 0;
    snprintf(path + n, PATH_MAX, "/%s", name);
    return strikes(what, path);
}
#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
ssize_t write(int fd, const void *b, size_t n) { REAL(write); return strikes_fd("write", fd) ? -1 : real(fd, b, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) {
    REAL(pwrite); return strikes_fd("pwrite", fd) ? -1 : real(fd, b, n, o);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
    REAL(pwrite64); return strikes_fd("pwrite", fd) ? -1 : real(fd, b, n, o);
}
ssize_t writev(int fd, const struct iovec *v, int c) {
    REAL(writev); return strikes_fd("writev", fd) ? -1 : real(fd, v, c);
}
int fsync(int fd) { REAL(fsync); return strikes_fd("fsync", fd) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return strikes_fd("fdatasync", fd) ? -1 : real(fd); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); return strikes_fd("ftruncate", fd) ? -1 : real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); return strikes_fd("ftruncate", fd) ? -1 : real(fd, n); }
int truncate(const char *a, off_t n) { REAL(truncate); return strikes("truncate", a) ? -1 : real(a, n); }
int truncate64(const char *a, off64_t n) { REAL(truncate64); return strikes("truncate", a) ? -1 : real(a, n); }
int rename(const char *a, const char *b) { REAL(rename); return strikes("rename", b) ? -1 : real(a, b); }
int unlink(const char *a) { REAL(unlink); return strikes("unlink", a) ? -1 : real(a); }
int unlinkat(int d, const char *a, int f) { REAL(unlinkat); return strikes_at("unlinkat", d, a) ? -1 : real(d, a, f); }
int rmdir(const char *a) { REAL(rmdir); return strikes("rmdir", a) ? -1 : real(a); }
int mkdir(const char *a, mode_t m) { REAL(mkdir); return strikes("mkdir", a) ? -1 : real(a, m); }
"""

# ---- the process that serves; it imports what the commands import, no test's helpers


def serve() -> None:
    """Run commands as lines of standard input ask, until it ends."""
    from multiprocessing import shared_memory

    import torch
    import torch._dynamo  # which a population's process brings
    from matplotlib.figure import Figure
    from typer.testing import CliRunner

    from mbcd_cli.cli import app
    from mbcd_cli.launch.launch import launch
    from mbcd_cli.launch.worker import Worker

    torch.set_num_threads(1)
    # To draw would take most of the time. The file is written where and as it would be.
    Figure.savefig = lambda figure, path, **how: path.write_bytes(b"a picture")
    shim = ctypes.CDLL(None)
    shim.calls.restype = ctypes.c_long
    shim.struck.restype = ctypes.c_char_p
    shim.prctl(_SUBREAPER, 1, 0, 0, 0)
    Worker._start = _forked
    launch.__kwdefaults__["poll"] = 0.02
    shared_memory._SHM_NAME_PREFIX = f"/c{os.getpid()}-"
    gc.freeze()  # or every child copies what it only looks at
    for line in sys.stdin:
        words, folder, number, fault = json.loads(line)
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiver)
            os.set_inheritable(sender, False)
            signal.alarm(_LONGEST)
            shim.arm(folder.encode(), ctypes.c_long(number), fault)
            result = CliRunner().invoke(app, words, prog_name="mbcd")
            told = {
                "code": result.exit_code,
                "calls": shim.calls(),
                "struck": shim.struck().decode(),
                "said": result.stderr[-3000:],
                "modules": [] if number >= 0 else sorted(sys.modules),
            }
            shim.disarm()
            with os.fdopen(sender, "wb") as pipe:
                pipe.write(json.dumps(told).encode())
            _run_finalizers()
            os._exit(0)
        os.close(sender)
        print(json.dumps({"pid": child}), flush=True)
        with os.fdopen(receiver, "rb") as pipe:
            told = pipe.read()
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):  # at its very end, perhaps
            told = b""
        answer = json.loads(told) if told else {"code": -os.WTERMSIG(status), "calls": 0, "said": "", "struck": ""}
        for name in answer.pop("modules", ()):  # the next child has them already
            if name not in sys.modules:
                with suppress(Exception):
                    importlib.import_module(name)
        answer["left"] = _left_over()
        print(json.dumps(answer), flush=True)


def _run_finalizers() -> None:
    """What an interpreter does before it ends, of that which matters to others."""
    from multiprocessing import util

    util._exit_function()


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    return [one for child in children(pid) for one in (child, *descendants(child))]


def ended(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def command_line(pid: int) -> str:
    """What a process was started as; empty where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def _left_over() -> list[str]:
    """Command lines of what is still there after `GRACE` seconds, killed then."""
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not descendants(os.getpid()):
            return []
        time.sleep(0.02)
    left = descendants(os.getpid())
    names = [f"{pid} {command_line(pid)}" for pid in left]
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return names


class _Fork:
    """What `launch.worker` asks of its process: here one that is forked."""

    def __init__(self, pid: int, held: int, told: int) -> None:
        self.pid, self.code = pid, None
        self.stdin, self.stdout = os.fdopen(held, "wb"), os.fdopen(told, "rb")

    def poll(self):
        return self.code if self.code is not None else self._reap(os.WNOHANG)

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or 0.0)
        while self.poll() is None:
            if timeout is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("cell", timeout)
            time.sleep(0.01)
        return self.code

    def _reap(self, how: int):
        pid, status = os.waitpid(self.pid, how)
        if pid:
            self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


def _forked(worker, order):
    """`Worker._start`, whose process is forked, in a session of its own, and does what its module does."""
    from mbcd_cli.launch import warm

    (theirs, ours), (told, tells) = os.pipe(), os.pipe()
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(ours)
        os.close(told)
        for number, to in ((theirs, 0), (tells, 1), (log, 2)):
            os.dup2(number, to)
            os.close(number)
        sys.stdin = os.fdopen(0)
        code = 1
        try:
            code = warm.serve()
        finally:
            os._exit(code)
    for one in (theirs, tells, log):
        os.close(one)
    return _Fork(pid, ours, told)


# ---- the tests' side


class Server:
    """Runs commands, one at a time.

    Args:
        folder: for its library, and for the temporary files of what it runs.
    """

    def __init__(self, folder: Path) -> None:
        source, library = folder / "shim.c", folder / "shim.so"
        source.write_text(SHIM)
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        environ = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True)

    def begin(self, words, folder: Path, number: int = -1, fault: int = 0) -> int:
        """Start a command whose `number`-th call below `folder` is to fail; its process."""
        self.process.stdin.write(json.dumps([[str(word) for word in words], str(folder), number, fault]) + "\n")
        self.process.stdin.flush()
        return self._answer()["pid"]

    def end(self) -> dict:
        """How it ended: `code`, `calls`, `struck`, `said`; and `left`, what it has started and that did not end."""
        answer = self._answer()
        blocks = Path("/dev/shm").glob(f"c{self.process.pid}-*")
        for path in (*self.temporary.iterdir(), *blocks):
            answer["left"].append(f"file {path}")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return answer

    def _answer(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def run(self, words, folder: Path, number: int = -1, fault: int = 0) -> dict:
        """`begin` and `end`."""
        self.begin(words, folder, number, fault)
        return self.end()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


SMALL = (
    "modalities.audio.samples=2000",
    "modalities.audio.nperseg=128",
    "modalities.audio.noverlap=64",
    "modalities.audio.width=2",
    "cache.views=1",
    "cache.shard_clips=6",
    "model.hidden=4",
    "training.batch_size=2",
    "runtime.prefetch=0",
)


def _sets(*sets: str) -> list[str]:
    return [word for one in sets for word in ("--set", one)]


_WORKERS = (
    *(*SMALL, "cache.workers=2", "modalities.video.width=1", "modalities.video.cut=input"),
    *("modalities.video.frames=8", "modalities.video.crop=112", "modalities.video.short_side=112"),
)


def words_of(command: str, home: Path, out: Path) -> list[object]:
    """A command that reads `home` and writes below `out`.

    With workers, video is decoded: by `prepare`, or in every epoch by `train` and what a sweep runs.
    """
    workers = command.endswith(" with workers")
    sets = _sets(*(_WORKERS if workers else (*SMALL, "cache.workers=0")))
    dataset = ["--dataset", "clips" if workers else "tiny", "--cache-dir", home / ("fresh" if workers else "cache")]
    if command == "prepare with workers":
        return ["prepare", "manifest", "--root", home / "clips", "--modalities", "video", "--cache-dir", out, *sets]
    if command == "prepare fresh":
        return [*words_of("prepare with workers", home, out), *_sets("cache.views=0")]
    if command == "prepare":
        return ["prepare", "manifest", "--root", home / "tiny", "--cache-dir", out, *sets]
    if command.startswith("train"):
        there = (out / "run" / "settings.toml").exists()
        more = ["--modalities", "video", *_sets("cache.views=0")] if workers else []
        words = ["train", "--target-domain", "beta" if workers else "gamma", "--epochs", 2, "--run", out / "run"]
        return [*words, *dataset, *sets, *more, *(["--resume"] if there else [])]
    if command == "evaluate":
        return ["evaluate", "--run", home / "run", "--output", out, "--analyses", "missing", "--export", "csv"]
    if command == "landscape":
        few = ("points=3", "analyses=['surface', 'curvature']", "eigenvalues=1", "trace_probes=1", "density_probes=1")
        words = ["landscape", "--checkpoint", home / "run/checkpoints/best.pt", "--output", out]
        return [*words, *_sets(*(f"landscape.{one}" for one in few))]
    few = ("training.epochs=1", "evaluation.analyses=[]", "evaluation.report=false", "evaluation.export=[]")
    what = {
        "sweep": ["--methods", "erm,mbcd", "--seeds", 1, "--jobs", 2],
        "sweep of one": ["--methods", "erm", "--seeds", 1, "--retry-failed"],
        "sweep of packs": ["--methods", "erm", "--seeds", 2, "--pack", 2, "--retry-failed"],
    }[command]
    names = ["--runs-dir", out / "runs", "--output", out / "sweep"]
    return ["sweep", *dataset, "--targets", "gamma", *what, *names, *sets, *_sets(*few)]


def furnish(server: Server, home: Path) -> Path:
    """A tiny dataset of sound and vectors, its cache and a run on it."""
    import csv

    import helpers

    helpers.write_dataset(home / "clips")
    helpers.write_dataset(home / "tiny", domains=("alpha", "beta", "gamma"), train=1)
    with (home / "tiny/manifest.csv").open() as file:
        rows = [{key: value for key, value in row.items() if key != "video"} for row in csv.DictReader(file)]
    helpers.write_manifest(home / "tiny/manifest.csv", rows)
    for command, out in (("prepare", home / "cache"), ("prepare fresh", home / "fresh"), ("train", home)):
        told = server.run(words_of(command, home, out), home)
        assert told["code"] == 0, told
    return home


def contents(folder: Path) -> dict[str, object]:
    """Every file below a folder: its bytes, or what of it does not tell the time.

    Of events, locks and kept answers (they are kept where files are old enough) nothing.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        other = path.name.startswith((".lock", "unchanged-")) or path.suffix == ".lock"
        if path.is_file() and "events" not in path.parts and not other:
            found[path.relative_to(folder).as_posix()] = _timeless(path)
    return found


def check_ended(command: str, told: dict, out: Path, expected: dict[str, object]) -> None:
    """A command given once more has ended in the files that it should, and left nothing behind."""
    assert told["code"] == 0 or (command.startswith("train") and "already holds a run" in told["said"])
    files = contents(out)
    assert files.keys() == expected.keys(), files.keys() ^ expected.keys()
    different = [key for key in files if files[key] != expected[key]]
    assert not different, different
    assert not told["left"], told["left"]


def _timeless(path: Path) -> object:
    import h5py
    import numpy as np

    from mbcd_cli.files import read_json

    if path.name == "timing.jsonl" or path.suffix == ".log":
        return None
    if path.name == "done":
        told = read_json(path)
        timed = ("seconds", "steps_per_second", "peak_memory_mb", "files")
        files = sorted(name for name in told["files"] if not name.startswith("events/"))
        return {key: value for key, value in told.items() if key not in timed} | {"files": files}
    if path.name == "index.h5":
        with h5py.File(path) as file:
            names = ("files", "clips/id", "rows/clip", "rows/view", "rows/shard", "rows/row")
            return [np.asarray(file[name][()]).tolist() for name in names]
    return path.read_bytes()


if __name__ == "__main__":
    serve()
