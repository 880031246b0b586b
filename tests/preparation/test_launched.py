"""A preparation shared by processes that a launcher begins; tests/cluster has it on real clusters."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import helpers
import pytest
from test_cache import contents, same, settings_for

from mbcd_cli.errors import CacheError
from mbcd_cli.launch.engines import Launching
from mbcd_cli.launch.unit import BUSY_CODE, DONE_CODE, FAILED_CODE, beside
from mbcd_cli.locks import lock
from mbcd_cli.preparation import launched
from mbcd_cli.preparation.launched import prepare_launched, run_part
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.say import Say

NOTHING = {"corruptions": (), "severities": (1,)}


def test_parts_fill_the_cache_of_one_process(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    (root / "video" / "alpha_0_0.mp4").write_bytes(b"no video")
    alone = prepare(settings_for(root, tmp_path / "one", "cache.shard_clips=1"))
    settings, said = settings_for(root, tmp_path / "two", "cache.shard_clips=1"), []
    for name, age in (("old", 8), ("new", 6)):
        (tmp_path / "two" / f".crew-{name}").mkdir(parents=True)
        os.utime(tmp_path / "two" / f".crew-{name}", (time.time() - age * 24 * 3600,) * 2)
    shared = prepare_launched(settings, how=Launching(jobs=2), **NOTHING, say=Say(said.append))
    assert [bad.clip for bad in shared.rejected] == [bad.clip for bad in alone.rejected] == ["alpha_0_0"]
    for name, entry in alone.modalities.items():
        assert same(contents(Path(entry.folder)), contents(Path(shared.modalities[name].folder)))
    for part in ("part 1", "part 2"):  # one that began late may have found nothing left
        states = [line.partition(";")[0] for line in said if line.startswith(part)]
        assert states in ([f"{part} of 2 runs", f"{part} of 2 has ended"], [f"{part} of 2 has ended"]), said
    assert [left.name for left in (tmp_path / "two").glob(".crew-*")] == [".crew-new"], "a command that is under way"


def test_where_nothing_has_changed_no_part_is_begun(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    for file in (root, *root.rglob("*")):
        os.utime(file, (1, 1))  # an answer is kept of what was there before the work
    settings = settings_for(root, tmp_path / "cache", "model.modalities=audio")
    first = prepare(settings)
    monkeypatch.setattr(launched, "launch", None)
    again = prepare_launched(settings, how=Launching(jobs=2), **NOTHING)
    assert again.modalities["audio"].shards_reused == first.modalities["audio"].shards


def test_a_part_is_told_by_the_files_beside_its_folder(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    folder, said = tmp_path / "crew" / "part-001", []
    part = launched.Part("key", "part 1", folder)
    unit = launched.PartUnit((part,), settings_for(root, tmp_path / "cache", "model.modalities=audio"), "[[], [1]]")
    assert unit.state(part) == "waiting"
    unit.write(part)
    with lock(beside(folder, "lock")):
        assert unit.state(part) == "running"
        assert run_part(folder, threads=1, spoilt=unit.spoilt) == BUSY_CODE
    monkeypatch.setattr(launched, "prepare", lambda *_, **__: (_ for _ in ()).throw(CacheError("no room", "make some")))
    assert run_part(folder, threads=1, spoilt=unit.spoilt, say=Say(said.append)) == FAILED_CODE
    assert (unit.state(part), unit.error(part)) == ("failed", "no room")
    assert said == ["error: no room\nmake some"]
    monkeypatch.undo()
    assert run_part(folder, threads=1, spoilt=unit.spoilt) == DONE_CODE
    assert unit.state(part) == "done"
    late = launched.Part("key", "part 2", folder.with_name("part-002"))
    assert unit.state(late) == "done", "before it began"
    unit.write(late)
    monkeypatch.setattr(launched, "prepare", None)
    assert run_part(late.folder, threads=1, spoilt=unit.spoilt) == DONE_CODE, "and loads no weights"


def test_the_command_itself_needs_no_gpu(tmp_path, monkeypatch):
    """That of a login node: the processes that take part have one."""
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    for file in (root, *root.rglob("*")):
        os.utime(file, (1, 1))  # the first time the kept answer is given
    prepare(settings_for(root, tmp_path / "cache", "model.modalities=audio"))
    settings = settings_for(root, tmp_path / "cache", "model.modalities=audio", "runtime.device=cuda:99")
    (tmp_path / "cache" / ".crew-gone").symlink_to("nowhere")  # of another command, which has just ended
    for _ in range(2):
        prepared = prepare_launched(settings, how=Launching(), **NOTHING)
        assert prepared.modalities["audio"].clips == 6
        monkeypatch.setattr(launched, "kept_answer", lambda _: None)
        monkeypatch.setattr(launched, "launch", lambda board, *_, **__: board)


def test_what_an_interrupted_command_was_through_with_is_looked_at_again(tmp_path, monkeypatch):
    """There may be other clips now; a job of it that begins when all is over leaves nothing."""
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    settings, folders = settings_for(root, tmp_path / "cache", "model.modalities=audio"), []

    def launch(board, *_, **__):
        (part,) = board.waiting.values()
        folders.append(part.folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(launched, "launch", launch)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare_launched(settings, how=Launching(), **NOTHING)
        folders[0].parent.mkdir(parents=True, exist_ok=True)
        for marked in (folders[0], folders[0].with_name("part-002")):  # it may have been of more
            beside(marked, "done").touch()
    assert folders == [folders[0]] * 2
    shutil.rmtree(folders[0].parent)
    assert run_part(folders[0], threads=1, spoilt="[[], [1]]") == DONE_CODE
    assert not folders[0].parent.exists()


def test_where_all_fail_the_first_says_why(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny", domains=("alpha",))
    settings = settings_for(root, tmp_path / "cache", "cache.weights_dir=nowhere", "modalities.video.weights=none.pt")
    with pytest.raises(CacheError, match=r"none\.pt: the weights of encoder small-video are not there") as caught:
        prepare_launched(settings, how=Launching(), **NOTHING)
    assert str(tmp_path / "cache" / ".crew-") in caught.value.remedy
