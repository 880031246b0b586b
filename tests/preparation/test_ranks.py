"""Several processes fill one cache: the same bytes, one index, locks that keep other jobs out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import helpers
import numpy as np
import pytest
from test_cache import contents, same, settings_for

from mbcd_cli.data.modality_cache import ModalityCache
from mbcd_cli.data.ranks import locked, partial_is_ours
from mbcd_cli.errors import CacheError, RunError
from mbcd_cli.place import Place
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.processes import ALONE
from mbcd_cli.resolved import resolve

SETS = [part for assignment in [*helpers.SMALL, "cache.shard_clips=1"] for part in ("--set", assignment)]


def start(root: Path, cache: Path, rank: int, world: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "mbcd_cli", "prepare", "manifest", "--root", str(root), "--json"]
    command += ["--cache-dir", str(cache), *SETS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_fill_one_cache(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")
    (root / "video" / "beta_0_0.mp4").write_bytes(b"no video")  # shard 6: rank 0's; told by rank 0
    (root / "video" / "beta_0_1.mp4").write_bytes(b"no video")  # shard 7: rank 1's; told by rank 0 all the same
    processes = [start(root, tmp_path / "two", rank, 2) for rank in (0, 1)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [3, 0], answers
    assert answers[1][0] == ""
    done = json.loads(answers[0][0])
    alone = prepare(settings_for(root, tmp_path / "one", "cache.shard_clips=1"))
    assert [r["clip"] for r in done["rejected"]] == [bad.clip for bad in alone.rejected] == ["beta_0_0", "beta_0_1"]
    for name, entry in alone.modalities.items():
        assert entry.fingerprint == done["modalities"][name]["fingerprint"]
        assert done["modalities"][name]["clips"] == entry.clips
        assert same(contents(Path(entry.folder)), contents(Path(done["modalities"][name]["folder"])))
    assert not list((tmp_path / "two").rglob("*.partial"))


def test_rank_0_ends_when_the_others_have_died(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    settings = settings_for(root, tmp_path / "cache", "cache.shard_clips=1", "model.modalities=audio")
    monkeypatch.setattr("mbcd_cli.data.ranks.PATIENCE", 0.0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"3 shards of process \[1\]"):
        prepare(settings)
    assert not list((tmp_path / "cache").rglob("index.h5"))
    monkeypatch.setenv("RANK", "1")
    assert prepare(settings) is None
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert prepare(settings).modalities["audio"].shards_reused == 6


def test_locks_of_ranks(tmp_path):
    with locked(tmp_path, Place(0, 2)), locked(tmp_path, Place(1, 2)):
        for other in (ALONE, Place(1, 2), Place(0, 4)):
            with pytest.raises(CacheError, match="Another mbcd process"), locked(tmp_path, other):
                pass
    with locked(tmp_path), pytest.raises(CacheError), locked(tmp_path, Place(0, 2)):
        pass


def test_who_removes_what_was_left_half_written():
    assert partial_is_ours(Path(".shard-00004.h5.host.7.partial"), Place(1, 3))
    assert not partial_is_ours(Path(".shard-00003.h5.host.7.partial"), Place(1, 3))
    assert not partial_is_ours(Path(".index.h5.host.7.partial"), Place(1, 3))
    assert partial_is_ours(Path(".index.h5.host.7.partial"), Place(0, 3))


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
