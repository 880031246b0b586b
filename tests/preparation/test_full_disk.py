"""`prepare` on a small file system of its own that fills up in the midst, and is enlarged."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path

import helpers
import pytest
from typer.testing import CliRunner

from mbcd_cli.cli import app

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000


def alone_with_a_disk(folder: Path, size: str) -> bool:
    """Give this process mounts of its own, and `folder` a file system of `size`; whether the kernel lets it."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(_NEW_USER | _NEW_MOUNTS):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return not subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode


def test_a_disk_that_fills_up_costs_the_shard_that_found_it_full(tmp_path):
    root, cache = helpers.write_dataset(tmp_path / "tiny"), tmp_path / "cache"
    cache.mkdir()
    sets = [word for one in helpers.SMALL for word in ("--set", one)]
    words = ["prepare", "manifest", "--root", root, "--cache-dir", cache, "--modalities", "pose", "--json", *sets]

    def run() -> tuple[int, str, list[str]]:
        done = CliRunner().invoke(app, [str(word) for word in words], prog_name="mbcd")
        files = sorted(path.name for path in cache.rglob("*") if path.is_file())
        return done.exit_code, done.stdout if done.exit_code == 0 else done.stderr, files

    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        told = []
        if alone_with_a_disk(cache, "40k"):
            told.append(run())
            subprocess.run(["mount", "-o", "remount,size=10m", cache], check=True)
            told.append(run())
        os.write(sender, json.dumps(told).encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        told = json.loads(pipe.read())
    os.waitpid(child, 0)
    if not told:
        pytest.skip("this user may not mount a file system")
    (code, said, files), (again, summary, _) = told
    shards = [name for name in files if name.startswith("shard-")]
    assert code == 1
    assert "The disk is full" in said
    assert "it goes on after the shards that are done" in said
    assert said.count("error:") == 1
    assert not [name for name in files if name.endswith(".partial")]
    assert shards
    assert again == 0
    assert json.loads(summary)["modalities"]["pose"]["shards_reused"] == len(shards)
