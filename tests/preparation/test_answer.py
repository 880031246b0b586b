"""`prepare` once more: answered without reading while nothing has changed, done again when anything has."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from mbcd_cli.checksums import ANSWER
from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.encoders import build_encoder
from mbcd_cli.errors import MbcdError
from mbcd_cli.integrity import examine
from mbcd_cli.preparation import prepare as preparing
from mbcd_cli.preparation.repair import repair
from mbcd_cli.resolved import resolve


def old(*paths: Path) -> None:
    """As if written a minute ago: an answer is kept only where no file is younger than the work."""
    for path in paths:
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 60 * 10**9))


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "vectors"
    rows = []
    for index in range(8):
        helpers.write_array(root / f"{index}.npy", np.full(4, index, np.float32))
        split = "train" if index % 2 else "test"
        rows.append(
            {"id": f"c{index}", "domain": "abcd"[index // 2], "split": split, "label": index % 2, "x": f"{index}.npy"}
        )
    helpers.write_manifest(root / "manifest.csv", rows)
    old(*root.iterdir())
    return root


@pytest.fixture
def prepare(root, tmp_path, monkeypatch):
    """Prepares; returns what that returned and whether the table was read for it."""
    listed = []
    reading = preparing.read_listing
    monkeypatch.setattr(preparing, "read_listing", lambda settings: listed.append(1) or reading(settings))

    def run(*sets: str) -> tuple[preparing.Prepared, bool]:
        listed.clear()
        flags = {"dataset.reader": "manifest", "dataset.root": root, "cache.dir": tmp_path / "cache"}
        return preparing.prepare(resolve(flags=flags, sets=sets)), bool(listed)

    return run


def test_nothing_is_read_while_nothing_has_changed(prepare):
    first, listed = prepare()
    assert listed
    again, listed = prepare()
    assert not listed
    done = first.modalities["x"]
    assert again == replace(first, modalities={"x": replace(done, shards_reused=done.shards, seconds=0.0)})


def test_an_answer_is_found_damaged_or_another_ones_and_repair_takes_it_away(prepare, tmp_path):
    prepare()
    (answer,) = (tmp_path / "cache").glob(f"*/{ANSWER}*.json")
    whole = answer.read_bytes()
    other = answer.with_name(f"{ANSWER}{'0' * 12}.json")
    for file, content in ((answer, whole[: len(whole) // 2]), (answer, b"{}"), (other, whole)):
        file.write_bytes(content)
        assert examine(tmp_path / "cache").faults == [file]
        repair(tmp_path / "cache")
        assert not examine(tmp_path / "cache").faults
        assert not file.exists()


def rewrite(root: Path, cache: Path) -> None:
    helpers.write_array(root / "3.npy", np.full(4, 99, np.float32))


def append(root: Path, cache: Path) -> None:
    table = root / "manifest.csv"
    table.write_text(table.read_text().replace("c7", "c8"))


def vanish(root: Path, cache: Path) -> None:
    next(cache.glob("*/x-*/shard-*.h5")).unlink()


def cut(root: Path, cache: Path) -> None:
    index = next(cache.glob("*/x-*/index.h5"))
    index.write_bytes(index.read_bytes()[:-9])


def spoil(root: Path, cache: Path) -> None:
    kept = next(cache.glob("*/unchanged-*.json"))
    kept.write_text(kept.read_text().replace('"clips": 8', '"clips": 9'))


@pytest.mark.parametrize("change", [rewrite, append, vanish, cut, spoil])
def test_any_change_is_seen(prepare, root, tmp_path, change):
    prepare()
    change(root, tmp_path / "cache")
    again, listed = prepare()
    assert listed
    assert again.clips == 8


def test_other_settings_have_an_answer_of_their_own(prepare):
    prepare()
    assert prepare("modalities.x.noise=0.1")[1]
    assert not prepare("modalities.x.noise=0.1")[1]


def test_no_answer_is_kept_where_a_file_may_have_changed_meanwhile(prepare, root):
    helpers.write_array(root / "3.npy", np.zeros(4, np.float32))
    os.utime(root / "3.npy")
    prepare()
    assert prepare()[1]


def test_a_rejected_clip_is_tried_again(prepare, root):
    (root / "3.npy").write_bytes(b"no array")
    old(root / "3.npy")
    prepare("dataset.max_bad=1")
    again, listed = prepare("dataset.max_bad=1")
    assert listed
    assert [bad.clip for bad in again.rejected] == ["c3"]


def test_a_passport_that_comes_later_is_looked_at(prepare, root, tmp_path):
    torch.manual_seed(0)
    sets = ("modalities.x.encoder=array-mlp", "modalities.x.cut=pool", "modalities.x.weights=w.pt")
    weights = tmp_path / "weights"
    weights.mkdir()
    encoder = build_encoder("x", ArrayModality(dimension=4))
    torch.save(encoder.stages.state_dict(), weights / "w.pt")
    old(weights / "w.pt")
    sets += (f"cache.weights_dir={weights}",)
    prepare(*sets)
    assert not prepare(*sets)[1]
    (weights / "w.pt.passport.json").write_text("{}")
    with pytest.raises(MbcdError, match="passport"):
        prepare(*sets)
