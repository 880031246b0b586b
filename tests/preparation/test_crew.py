"""Several processes fill one cache: shards are taken when free, whoever dies; the same bytes, one index."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import helpers
import numpy as np
import pytest
from test_cache import contents, same, settings_for

from mbcd_cli.data.cache import CacheWriter, shard_path
from mbcd_cli.data.modality_cache import ModalityCache
from mbcd_cli.data.records import Rejected
from mbcd_cli.errors import CacheError
from mbcd_cli.locks import held, lock
from mbcd_cli.place import Place
from mbcd_cli.preparation import crew
from mbcd_cli.preparation.crew import REPAIR, Crew
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve

SETS = [part for assignment in [*helpers.SMALL, "cache.shard_clips=1"] for part in ("--set", assignment)]


def start(root: Path, cache: Path, **environ: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "mbcd_cli", "prepare", "manifest", "--root", str(root), "--json"]
    command += ["--cache-dir", str(cache), *SETS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environ.items()}}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def as_alone(root: Path, alone: Path, answer: str) -> None:
    """What several processes made, and say, is what one does."""
    told, made = json.loads(answer), prepare(settings_for(root, alone, "cache.shard_clips=1"))
    assert [bad["clip"] for bad in told["rejected"]] == [bad.clip for bad in made.rejected]
    for name, entry in made.modalities.items():
        folder = Path(told["modalities"][name]["folder"])
        assert told["modalities"][name]["clips"] == entry.clips
        assert same(contents(Path(entry.folder)), contents(folder))
        assert ModalityCache(folder).root_checksum == ModalityCache(Path(entry.folder)).root_checksum
        assert not [path.name for path in folder.glob(".*") if path.name != ".lock"]


def test_two_processes_of_a_launcher_fill_one_cache(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")
    for clip in ("beta_0_0", "beta_0_1"):
        (root / "video" / f"{clip}.mp4").write_bytes(b"no video")
    processes = [start(root, tmp_path / "two", RANK=rank, WORLD_SIZE=2) for rank in (0, 1)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [3, 0], answers
    assert answers[1][0] == ""
    as_alone(root, tmp_path / "one", answers[0][0])


@pytest.mark.parametrize("number", [None, errno.ENOLCK], ids=["locks", "no locks"])
def test_what_a_dead_process_held_is_taken_over(tmp_path, number):
    """The first is killed; a second joins before, a third after."""
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    environ = {} if number is None else helpers.without_flock(tmp_path, number)
    first = start(root, tmp_path / "many", **environ)
    helpers.until(lambda: list((tmp_path / "many").glob("tiny/*/shard-*.h5")), first)
    second = start(root, tmp_path / "many", **environ)
    helpers.until(lambda: list((tmp_path / "many").glob("tiny/*/shard-00003.h5")), first)
    first.kill()
    first.communicate()
    third = start(root, tmp_path / "many", **environ)
    answers = [process.communicate(timeout=120) for process in (second, third)]
    assert [process.returncode for process in (second, third)] == [0, 0], answers
    for answer, _ in answers:
        as_alone(root, tmp_path / "one", answer)


def test_a_shard_is_one_process_until_it_is_written_or_the_process_is_gone(tmp_path):
    def shared(plan="a", **place):
        return Crew(tmp_path, plan, Place(**place))

    with shared() as first, shared(rank=1, world=2) as second:
        assert first.lead()
        assert not second.lead()
        asked = first.free(range(4), lambda number: number == 0)
        assert next(asked) == 1  # 0 is done by now
        assert next(second.free(range(4), lambda number: False)) == 2  # begins elsewhere
        assert list(second.free([1, 2], lambda number: False)) == []
        assert not first.any_free([1, 2])
        second.give(2)
        assert first.any_free([1, 2])
        first.__exit__()
        assert list(second.free([1], lambda number: False)) == [1]
        assert second.lead()  # when who led is gone


def test_a_shard_is_given_back_when_it_is_written_and_the_index_tells_what_was_reported(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    (root / "video" / "alpha_0_0.mp4").write_bytes(b"no video")
    given, reported = [], []
    give, finish = Crew.give, CacheWriter.finish

    def noted(crew, number):
        given.append((shard_path(crew.folder, number).exists(), held(crew.folder / f".lock-{number:05d}")))
        give(crew, number)

    def read_again(writer, unlisted=(), **more):
        unlisted = (*unlisted, Rejected("alpha_9_9", str(writer.recipe["modality"]), "x", "of the reader", "mend it"))
        made = finish(writer, unlisted, **more)
        reported.append((made, writer.finished(unlisted)))
        return made

    monkeypatch.setattr(Crew, "give", noted)
    monkeypatch.setattr(CacheWriter, "finish", read_again)
    prepare(settings_for(root, tmp_path / "cache", "cache.shard_clips=1"))
    assert len(given) > 6
    assert set(given) == {(True, True)}
    assert all(made == read for made, read in reported)
    assert sorted(len(made.rejected) for made, _ in reported) == [0, 1]


def test_who_disagrees_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "_SOON", 0.1)
    with Crew(tmp_path, "a") as first, Crew(tmp_path, "b") as other, Crew(tmp_path, REPAIR) as repair:
        assert first.lead()
        with pytest.raises(CacheError, match=f"Another mbcd process .process {os.getpid()} on .* into other shards"):
            other.lead()
        with pytest.raises(CacheError, match=r"is preparing [^,]*\.\n"):
            repair.lead()
        assert next(first.free([5], lambda number: False)) == 5
        first._leading.close()  # killed, while another process of its plan goes on
        for one in (other, repair):
            with pytest.raises(CacheError, match="is preparing"):
                one.lead()
        first.give(5)
        assert repair.lead()
        with Crew(tmp_path, REPAIR) as another, pytest.raises(CacheError, match="is repairing"):
            another.lead()
        with Crew(tmp_path, "a") as late, pytest.raises(CacheError, match="is repairing"):
            late.lead()
        with pytest.raises(CacheError, match="is repairing"):  # it had read its own plan before
            next(other.free([5], lambda number: False))


def test_one_that_agrees_before_who_leads_has_looked_round_is_no_other(tmp_path, monkeypatch):
    """The disk takes its time with the plan: long enough for another process to read it and take a shard."""
    synced = []
    monkeypatch.setattr(crew.os, "fsync", lambda handle: synced.append(time.sleep(0.3)))
    with Crew(tmp_path, "a") as first, Crew(tmp_path, "a") as second:
        both = threading.Thread(target=lambda: taken.append((second.lead(), next(second.free([0], lambda _: False)))))
        taken, later = [], threading.Timer(0.1, both.start)
        later.start()
        assert first.lead()
        later.join()
        both.join()
        assert taken == [(False, 0)]
    assert synced


def test_who_would_cut_otherwise_leaves_the_plan_as_it_is(tmp_path):
    """One of the plan before took a shard when the other had looked round."""
    with Crew(tmp_path, "a") as gone:
        assert gone.lead()
    at_work, other = Crew(tmp_path, "a"), Crew(tmp_path, "b")
    look = other._refuse_others
    other._refuse_others = lambda: (look(), next(at_work.free([0], lambda _: False), None))
    with at_work, other, pytest.raises(CacheError, match="cut into other shards"):
        other.lead()
    assert (tmp_path / ".lock").read_text().split()[0] == "a"


def test_the_plan_of_who_led_before_is_nobody_s(tmp_path):
    told = tmp_path / ".lock"
    told.write_text(f"{REPAIR} host 1\n")  # killed
    with Crew(tmp_path, "a") as second:
        first = lock(told)  # has not yet said how it leads
        later = threading.Timer(0.3, told.write_text, ["a host 2\n"])
        later.start()
        assert not second.lead()
        later.join()
        assert next(second.free([5], lambda number: False)) == 5
        told.write_text("b host 3\n")  # found shard 5 held, and gave up
        first.close()
        assert next(second.free([6], lambda number: False)) == 6
        assert told.read_text().startswith("a ")


def test_a_cache_of_nothing_is_removed_while_another_process_looks_for_its_lock(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    for clip in (root / "audio").iterdir():
        clip.write_bytes(b"no sound")
    remove = os.rmdir

    def rmdir(path, **more):
        if "audio-" in str(path):
            (Path(path) / ".lock").touch()
        remove(path, **more)

    monkeypatch.setattr(os, "rmdir", rmdir)
    with pytest.raises(CacheError, match="All 6 clips"):
        prepare(settings_for(root, tmp_path / "cache", "model.modalities=audio"))
    assert [path.name for path in (tmp_path / "cache").glob("tiny/*/*")] == [".lock"]


# NFS tells other hosts of a new name late (its attributes are cached): what another process gave a name to is not seen
# for twenty seconds.
_LATE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static char own[256][64];
static int owned;
static const char *base(const char *path) { const char *at = strrchr(path, '/'); return at ? at + 1 : path; }
static int hidden(int folder, const char *path) {
    const char *name = base(path);
    if (strncmp(name, "shard-", 6) && strcmp(name, "index.h5")) return 0;
    for (int i = 0; i < owned; i++) if (!strcmp(own[i], name)) return 0;
    struct stat told;
    struct timespec now;
    if (syscall(SYS_newfstatat, folder, path, &told, 0)) return 0;
    clock_gettime(CLOCK_REALTIME, &now);
    if (now.tv_sec - told.st_ctim.tv_sec + (now.tv_nsec - told.st_ctim.tv_nsec) / 1e9 > 20) return 0;
    fprintf(stderr, "hidden\n");
    errno = ENOENT;
    return 1;
}
int rename(const char *from, const char *to) {
    if (owned < 256) strncpy(own[owned++], base(to), 63);
    return syscall(SYS_rename, from, to);
}
#define OPEN(NAME) \
    int my_##NAME(const char *, int, ...) __asm__(#NAME); \
    int my_##NAME(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
        return hidden(AT_FDCWD, path) ? -1 : syscall(SYS_openat, AT_FDCWD, path, flags, mode); }
OPEN(open) OPEN(open64)
#define STAT(NAME) \
    int my_##NAME(const char *, void *) __asm__(#NAME); \
    int my_##NAME(const char *path, void *told) { \
        return hidden(AT_FDCWD, path) ? -1 : syscall(SYS_newfstatat, AT_FDCWD, path, told, 0); }
STAT(stat) STAT(stat64)
#define FSTATAT(NAME) \
    int my_##NAME(int, const char *, void *, int) __asm__(#NAME); \
    int my_##NAME(int folder, const char *path, void *told, int flags) { \
        return hidden(folder, path) ? -1 : syscall(SYS_newfstatat, folder, path, told, flags); }
FSTATAT(fstatat) FSTATAT(fstatat64)
"""


def test_names_that_are_seen_late_cost_time_alone(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    environ = {"LD_PRELOAD": helpers.shim(tmp_path, _LATE)}
    first = start(root, tmp_path / "two", **environ)
    helpers.until(lambda: list((tmp_path / "two").glob("tiny/*/shard-*.h5")), first)
    second = start(root, tmp_path / "two", **environ)
    answers = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], answers
    assert "hidden" in answers[1][1]
    for answer, _ in answers:
        as_alone(root, tmp_path / "one", answer)


def process_of(job: int, rank: int) -> int | None:
    """The process that torchrun (process `job`) started as this rank, once it is there."""
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == job and f"RANK={rank}" in (place / "environ").read_text().split("\0"):
                return int(place.name)
    return None


@pytest.mark.stress
@pytest.mark.parametrize("killed", range(4), ids="rank {}".format)
def test_four_processes_of_which_one_is_killed(tmp_path, killed):
    """torchrun ends the others; the same command again goes on, and the cache is that of one process."""
    root = tmp_path / "packed"
    helpers.write_array(root / "x.npy", np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32))
    rows = [
        {"id": f"c{i}", "domain": "ab"[i % 2], "split": ("train", "test")[i % 5 == 0], "label": 0, "x": f"x.npy#{i}"}
        for i in range(400)
    ]
    helpers.write_manifest(root / "manifest.csv", rows)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "mbcd_cli"]
    command += ["prepare", "manifest", "--root", str(root), "--cache-dir", str(tmp_path / "four"), "--workers", "0"]
    command += ["--set", "cache.shard_clips=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w+") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        helpers.until(lambda: list((tmp_path / "four").glob(f"packed/*/shard-{killed:05d}.h5")), job)
        os.kill(process_of(job.pid, killed), signal.SIGKILL)
        assert job.wait(timeout=120) != 0
        (folder,) = (tmp_path / "four").glob("packed/x-*")
        assert 0 < len(list(folder.glob("shard-*.h5"))) < 400
        assert not (folder / "index.h5").exists()
        again = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=120, check=False)
        assert again.returncode == 0, (log.seek(0), log.read())
    flags = {"dataset.root": root, "cache.dir": tmp_path / "one", "cache.workers": 0, "cache.shard_clips": 1}
    (entry,) = prepare(resolve(flags=flags)).modalities.values()
    assert same(contents(Path(entry.folder)), contents(folder))
    assert ModalityCache(folder).root_checksum == ModalityCache(Path(entry.folder)).root_checksum
    assert not list(folder.glob("*.partial"))
