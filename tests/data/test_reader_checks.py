"""Readers of the registry through the checks of `mbcd check reader`, and readers that fail them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import test_epic_kitchens as epic

from mbcd_cli.data.modalities import asked_modalities
from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.readers import READERS, Listing, ReaderEntry
from mbcd_cli.data.readers.reader_checks import READER_CHECKS, reader_checks
from mbcd_cli.data.records import Clip, Media
from mbcd_cli.errors import MbcdError
from mbcd_cli.resolved import resolve


def of_reader(name: str, root: Path, *sets: str) -> dict:
    settings = resolve(flags={"dataset.reader": name, "dataset.root": root}, sets=sets)
    return reader_checks(settings.dataset, asked_modalities(settings))


def epic_kitchens(folder: Path) -> dict:
    root = epic.frame_folders(folder / "EPIC")
    epic.write_tables(root / "splits")
    return of_reader("epic-kitchens", root, "modalities.video.frames=4")


OURS = {
    "manifest": lambda folder: of_reader("manifest", helpers.write_dataset(folder / "tiny")),
    "epic-kitchens": epic_kitchens,
}


@pytest.mark.parametrize("name", OURS)
def test_ours_keep_what_every_reader_promises(name, tmp_path):
    for check in OURS[name](tmp_path).values():
        check()


def listing(root: Path) -> Listing:
    """Two clips of one vector each."""
    clips = []
    for index in range(2):
        file = helpers.write_array(root / f"{index}.npy", np.zeros(3, np.float32))
        clips.append(Clip(f"c{index}", "here", "train", index, str(index), {"x": Media(file)}))
    return Listing("own", clips, ("here",), ("0", "1"), {"x": ArrayModality()})


def changed(**values):
    def change(found: Listing) -> Listing:
        return replace(found, clips=[replace(clip, **values) for clip in found.clips])

    return change


def another_order(found: Listing) -> Listing:
    another_order.turn = not getattr(another_order, "turn", False)
    return replace(found, clips=[*found.clips][:: -1 if another_order.turn else 1])


FAULTS = {
    "listing": changed(id="same"),
    "repeatable": another_order,
    "files": changed(media={"x": Media(Path("not-there.npy"))}),
    "views": lambda found: replace(found, modalities={"x": ArrayModality(dimension=4)}),
    "refusal": lambda found: found,
}


@pytest.mark.parametrize("check", READER_CHECKS)
def test_what_is_wrong_is_found(check, tmp_path, monkeypatch):
    entry = ReaderEntry(lambda dataset, modalities: FAULTS[check](listing(tmp_path)), "wrong")
    monkeypatch.setitem(READERS, "own", entry)
    with pytest.raises((AssertionError, MbcdError)):
        of_reader("own", tmp_path)[check]()
