"""Awkward files through the whole of `prepare`: used, mended with a note, or rejected with cause and remedy."""

from __future__ import annotations

from pathlib import Path

import helpers
import test_epic_kitchens as epic
import test_hac as hac

from mbcd_cli.commands.prepare import prepare
from mbcd_cli.layers import resolve

SMALL = [*helpers.SMALL, "modalities.flow.frames=4", "modalities.flow.short_side=24", "modalities.flow.crop=20"]


def prepared(reader: str, root: Path, cache: Path, *sets: str):
    settings = resolve(
        sets=[*SMALL, "modalities.flow.width=2", "dataset.name=awkward", *sets],
        flags={"dataset.reader": reader, "dataset.root": root, "cache.dir": cache},
    )
    result = prepare(settings)
    rejected = {(r["clip"], r["modality"]): r for r in result["rejected"]}
    assert all(r["cause"] and r["remedy"] and r["file"] for r in rejected.values())
    return result, rejected, settings


def test_truncated_jpg_and_missing_flow_direction(tmp_path):
    root = epic.frame_folders(tmp_path / "EPIC")
    epic.write_tables(root / "splits")
    jpg = root / "rgb/train/D1/P08_01/frame_0000000003.jpg"
    jpg.write_bytes(jpg.read_bytes()[:-40])
    gone = root / "flow/train/D2/P01_01/v"
    for path in gone.iterdir():
        path.unlink()
    gone.rmdir()
    sets = ("modalities.video.frames=12", "dataset.max_bad=99")
    result, rejected, _ = prepared("epic-kitchens", root, tmp_path / "nearest", *sets)
    notes = {one["clip"]: one["note"] for one in result["modalities"]["video"]["mended"]}
    assert any("frame_0000000003.jpg is damaged or cut short" in note for note in notes.values())
    assert {key[0].rpartition("-")[0] for key in rejected} == {"P01_01"}
    assert {key[1] for key in rejected} == {"flow"}
    _, rejected, _ = prepared("epic-kitchens", root, tmp_path / "reject", *sets, "dataset.missing_frames=reject")
    assert ("P08_01-101", "video") in rejected


def test_missing_flow_direction_of_files(tmp_path):
    root = hac.write_media(tmp_path / "HAC")
    hac.write_splits(root / "HAC_Splits")
    (root / "animal/flow/animal_1_flow_y.mp4").unlink()
    result, rejected, _ = prepared("hac", root, tmp_path / "cache", "modalities.audio.follow_frames=4")
    assert set(rejected) == {("animal-test-animal_1", "flow")}
    assert result["exit_code"] == 3
