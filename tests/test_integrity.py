"""Every stored byte has a checksum: what is damaged is found, named, and a cache's is computed anew as it was.

Under `-m stress` ROUNDS=500 tries 500 damages instead of 10,000, SEED=1 others.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path

import damage
import h5py
import numpy as np
import pytest
import torch
from commands import run, settings_for

from mbcd_cli import checksums
from mbcd_cli.data.cache import CacheWriter, shard_path
from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.errors import CacheError, MbcdError
from mbcd_cli.files import read_json, write_json, written, written_hdf5
from mbcd_cli.integrity import examine
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.preparation.repair import repair
from mbcd_cli.runs.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def earlier(home, tmp_path_factory) -> dict[Path, bytes]:
    """What the cache's files held before some media were changed, their sizes kept: all whole, of the same names."""
    before = damage.Snapshot.of(home / "tiny")
    for sound in (home / "tiny").rglob("*.wav"):
        sound.write_bytes(before.files[sound][:44] + before.files[sound][44:][::-1])
    prepare(settings_for(home / "tiny", cache := tmp_path_factory.mktemp("earlier")))
    before.restore()
    return {home / "cache" / path.relative_to(cache): data for path, data in damage.Snapshot.of(cache).files.items()}


def dataset_of(home: Path, *sets: str):
    return open_dataset(settings_for(home / "tiny", home / "cache", *sets), name="tiny")


def everything(dataset) -> list[torch.Tensor]:
    """Every row that a cache holds, and its weights."""
    rows = []
    for cache in dataset.caches.values():
        for view in range(-1, cache.views):
            stored = np.flatnonzero(cache.stored(view))
            if len(stored):
                rows += cache.read(stored, np.full(len(stored), view))
    return rows + [value for state in dataset.tail_weights.values() for value in state.values()]


@pytest.mark.parametrize("suffix", [".json", ".h5", ".pt"])
def test_a_stamped_file_tells_every_flipped_bit(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    if suffix == ".json":
        write_json(path, {"x": [1, 2, 3], "ö": "ä"})
        assert read_json(path) == {"x": [1, 2, 3], "ö": "ä"}
    elif suffix == ".h5":
        with written_hdf5(path) as file:
            file["x"] = np.arange(5)
    else:
        with written(path) as aside, aside.open("wb") as file:
            torch.save({"x": torch.arange(5)}, file)
        assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(5))
    assert checksums.verified(path) == checksums.checksum(path)
    whole = path.read_bytes()
    for at in np.random.default_rng(0).choice(len(whole), min(len(whole), 300), replace=False):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(checksums.DamagedError):
            checksums.verified(path)
    path.write_bytes(whole)
    checksums.stamp(path)  # stamped once more it is the same
    assert path.read_bytes() == whole


def test_what_commands_leave_is_whole(home):
    found = examine(home)
    assert not found.faults
    assert all(home / "tiny" in path.parents for path in found.unchecked)
    assert len(found.roots) == 2
    done = read_json(home / "run" / "done")
    assert {"settings.toml", "metrics.jsonl", "steps.jsonl", "checkpoints/best.pt"} <= set(done["files"])
    results = read_json(home / "run" / "results.json")
    assert "report.html" in results["files"]
    root = found.roots[next(iter((home / "cache/tiny").glob("video-*")))]
    assert results["provenance"]["video cache, root checksum"] == root
    table = run("verify", home / "cache", home / "run", "--json")
    assert table.data["exit_code"] == 0
    assert table.data["paths"][str(home / "cache")]["bytes"] > 0


def test_commands_at_work_are_no_damage(tmp_path):
    """What they write aside, and what is gone before its turn comes."""
    first, later = (write_json(tmp_path / name, {}) for name in ("first", "later"))
    (tmp_path / ".evaluation.partial").mkdir()
    write_json(tmp_path / ".evaluation.partial" / "results.json", {"files": {"report.html": "0" * 32}})
    found = examine(tmp_path, seen=lambda size: later.unlink())
    assert (found.whole, found.faults) == ([first], [])


def test_a_preparation_that_was_killed_is_not_finished_and_no_damage(home, tmp_path, monkeypatch):
    """Between the settings and the index, which come last."""
    settings = settings_for(home / "tiny", tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(settings)
    (cache,) = (tmp_path / "cache" / "tiny").iterdir()
    assert (cache / "prepare.toml").is_file()
    said = run("verify", tmp_path / "cache", code=1)
    told = " ".join((said.stdout + said.stderr).split())
    assert f"not finished: {cache}" in told
    assert "error: A cache without index.h5 is not prepared to its end: run the same `mbcd prepare` again" in told
    assert "missing:" not in told
    assert "not everything is whole" not in told
    assert run("verify", tmp_path, "--json", code=1).data["paths"][str(tmp_path)]["unprepared"] == [str(cache)]
    (cache / "shard-00000.h5").write_bytes(b"torn")
    both = run("verify", tmp_path / "cache", code=1)
    assert "error: not everything is whole" in both.stdout + both.stderr
    prepare(settings)
    run("verify", tmp_path / "cache")


def test_the_root_is_of_the_bytes_not_of_the_time(home, tmp_path):
    prepare(settings_for(home / "tiny", tmp_path))
    assert sorted(examine(tmp_path).roots.values()) == sorted(examine(home / "cache").roots.values())


@pytest.mark.parametrize("verify", ["first", "always", "off"])
def test_a_changed_row_is_named_when_it_is_read(home, kept, verify):
    rows = everything(dataset_of(home))
    dataset = dataset_of(home, f"runtime.verify={verify}")
    cache = dataset.caches["audio"]
    shard = shard_path(cache.folder, 0)
    with h5py.File(shard) as file:
        part = file["train/part0"]
        offset, size = part.id.get_offset(), part[0].nbytes
        clip = int(file["train/clip"][1])
    data = bytearray(shard.read_bytes())
    data[offset + size + 3] ^= 1
    shard.write_bytes(data)
    if verify == "off":
        assert len(everything(dataset)) == len(rows)
        return
    with pytest.raises(CacheError, match=rf"shard-00000\.h5 is damaged.*clip {cache.clips.ids[clip]}.*\n.*mbcd repair"):
        everything(dataset)


def test_a_shard_that_is_gone_is_called_missing(home, kept):
    shard_path(dataset_of(home).caches["audio"].folder, 0).unlink()
    with pytest.raises(CacheError, match=r"shard-00000\.h5 is missing\.\n.*mbcd repair"):
        everything(dataset_of(home))


def test_rows_are_bound_to_their_clip(home, kept):
    """Two rows that change places, with their checksums, are still told."""
    dataset = dataset_of(home)
    folder = dataset.caches["audio"].folder
    with h5py.File(shard_path(folder, 0), "r+") as file:
        for name in ("part0", "part0_sum"):
            values = file[f"train/{name}"][()]
            file[f"train/{name}"][...] = values[[2, 1, 0, *range(3, len(values))]]
    with pytest.raises(CacheError, match="is damaged"):
        everything(dataset_of(home))


def test_repair_brings_every_part_of_a_cache_back(home, kept):
    folders = sorted((home / "cache" / "tiny").glob("*/"))
    for file in [file for folder in folders for file in sorted(folder.iterdir()) if file.name != ".lock"]:
        for spoil in (lambda p: p.write_bytes(b"torn"), Path.unlink):
            spoil(file)
            assert run("verify", home / "cache", "--json", code=1).data["exit_code"] == 1
            run("repair", home / "cache", "--json")
            assert [path for path in kept["cache"].differs() if path.name not in ("index.h5", "prepare.toml")] == []
            assert not examine(home / "cache").faults
            kept["cache"].restore()


def test_repair_refuses_changed_media(home, kept):
    (folder,) = (home / "cache" / "tiny").glob("audio-*")
    shard = shard_path(folder, 0)
    shard.write_bytes(b"torn")
    for sound in (home / "tiny").rglob("*.wav"):
        data = sound.read_bytes()
        sound.write_bytes(data[:44] + data[44:][::-1])  # other samples; the size stays
    before = damage.Snapshot.of(home / "cache")
    assert "other bytes than it had" in run("repair", home / "cache", code=1).stderr
    assert not before.differs()
    sound.write_bytes(data[:-2])
    assert "not what it was prepared from" in run("repair", home / "cache", code=1).stderr
    assert not before.differs()


@pytest.mark.parametrize("name", ["index.h5", "shard-00000.h5", "prepare.toml"])
def test_a_whole_file_of_before_is_found_and_replaced(home, kept, earlier, name):
    (folder,) = (home / "cache" / "tiny").glob("audio-*")
    (folder / name).write_bytes(earlier[folder / name])
    assert examine(home / "cache").faults
    if name != "prepare.toml":  # settings are not data
        with pytest.raises(CacheError, match="another one than the cache was finished with"):
            everything(dataset_of(home))
    run("repair", home / "cache")
    assert not [path for path in kept["cache"].differs() if path.name not in ("index.h5", "prepare.toml")]
    assert not examine(home / "cache").faults


def test_what_is_read_before_it_is_verified_lies_in_no_heap(home):
    """HDF5 has no checksums in its heaps of texts, and may search a damaged one for ever."""
    for shard in (home / "cache").rglob("shard-*.h5"):
        with h5py.File(shard) as file:
            texts = [file[f"{group}/{name}"] for group in ("rejected", "mended") for name in file[group]]
            assert all(h5py.check_string_dtype(one.dtype).length for one in texts)
            assert h5py.check_string_dtype(file.attrs.get_id("conditions").dtype).length
    index = next((home / "cache").rglob("index.h5"))
    whole = index.read_bytes()
    at = whole.index(b"GCOL")
    index.write_bytes(whole[: at + 24] + b"\0" * 8 + whole[at + 32 :])  # size 0: the next object is this one
    with pytest.raises(MbcdError, match="is damaged"):
        dataset_of(home)
    index.write_bytes(whole)


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=[pytest.mark.stress, pytest.mark.timeout(0)])])
def test_random_damage_is_found_and_mended(home, kept, earlier, many):
    """Nothing that is struck goes unseen, ends in another number, or in an error that is not ours."""
    rounds = int(os.environ.get("ROUNDS", "10000")) if many else 60
    rng = np.random.default_rng(int(os.environ.get("SEED", "0")) if many else 0)
    rows = everything(dataset_of(home))
    best = home / "run/checkpoints/best.pt"
    weights = load_checkpoint(best).student
    files = [
        path for name in ("cache", "run", "landscape") for path in kept[name].files if not path.name.startswith(".lock")
    ]
    struck, counts = 0, Counter()
    while struck < rounds:
        path = files[rng.integers(len(files))]
        others = [p for p in files if p.suffix == path.suffix and p != path]
        kind = damage.strike(path, others, rng, stale=earlier.get(path))
        if kind is None:
            continue
        struck += 1
        counts[kind] += 1
        if struck % 500 == 0:
            print(f"{struck} damages, {counts['repaired']} caches repaired", flush=True)
        what = f"{kind} of {path}"
        found = examine(home)
        told = [*found.faults, *found.unfinished]
        # Without its summary a folder is as before its end: what the summary told of cannot be checked.
        assert told or (path.name in checksums.TELLERS and kind == "deleted" and found.unchecked), what
        if best in kept["run"].differs():
            with contextlib.suppress(MbcdError):
                now = load_checkpoint(best).student
                assert all(torch.equal(weights[key], now[key]) for key in weights), what
        if kept["cache"].differs():
            with contextlib.suppress(MbcdError):
                assert all(torch.equal(a, b) for a, b in zip(rows, everything(dataset_of(home)), strict=True)), what
            repair(home / "cache")
            counts["repaired"] += 1
            changed = {p.name for p in kept["cache"].differs()}
            answers = {name for name in changed if name.startswith(checksums.ANSWER)}  # one that is damaged is deleted
            assert changed - answers <= {"index.h5", "prepare.toml"}, what
            if changed:  # else every byte is as it was
                assert not examine(home / "cache").faults, what
                again = everything(dataset_of(home))
                assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True)), what
        for snapshot in kept.values():
            snapshot.restore()
    print(dict(counts))
