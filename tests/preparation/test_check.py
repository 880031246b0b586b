"""`mbcd prepare --check`: what is there, what is missing, how large; on miniatures and on the real tables in full."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shlex
from pathlib import Path

import helpers
import numpy as np
import pytest
import test_epic_kitchens as epic
import test_hac as hac
from typer.testing import CliRunner

from mbcd_cli.cli import app
from mbcd_cli.cli.prepare import show_prepared
from mbcd_cli.preparation.answer import Prepared
from mbcd_cli.preparation.check import check
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve

SETS = [part for assignment in helpers.SMALL for part in ("--set", assignment)]


def run(*arguments: object, code: int | None = 0):
    """Run `mbcd` in this process; the result has stdout, stderr and, with --json, `.data`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="mbcd")
    assert code in (None, result.exit_code), f"exit {result.exit_code}\n{result.stdout}\n{result.stderr}"
    result.data = json.loads(result.stdout) if "--json" in arguments else None
    return result


def tree(root: Path, cache: Path, *sets: str):
    return resolve(sets=[*helpers.SMALL, *sets], flags={"dataset.root": root, "cache.dir": cache})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return helpers.write_dataset(tmp_path_factory.mktemp("media") / "tiny")


def test_bytes_are_those_prepare_writes(root, tmp_path):
    settings = tree(root, tmp_path, "cache.shard_clips=4")
    before = check(settings)
    assert before.exit_code == 0
    assert before.fits
    assert not list(tmp_path.iterdir())
    done = prepare(settings)
    after = check(settings)
    for name, one in before.modalities.items():
        # HDF5 adds its own few kilobytes to every shard.
        assert 0 < done.modalities[name].bytes - one.bytes < 20_000 * one.shards
        assert one.shards == done.modalities[name].shards
        assert one.decode_timed_clips > 0
        assert one.seconds >= 0
        assert after.modalities[name].shards_there == one.shards
    assert before.bytes_to_write == before.bytes
    assert after.bytes_to_write == 0


def test_what_to_run_next_finds_what_was_prepared(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "prepare",
        "manifest",
        "--root",
        root,
        "--name",
        "tiny",
        "--config",
        "c.toml",
        "--views",
        1,
        "--cache-dir",
        "c d",
    ]
    words += ["--modalities", "video", "--missing-frames", "reject", "--workers", 0, "--set", "cache.seed=3"]
    assignments = (one.partition("=") for one in helpers.SMALL)
    (tmp_path / "c.toml").write_text("".join(f"{key} = {value}\n" for key, _, value in assignments))
    shown = " ".join(run(*words, "--set", "cache.shard_clips=2").stderr.split())
    (line,) = re.findall(r"Next: mbcd (train .*)", shown)
    assert "shard_clips" not in line
    assert "--dataset tiny" in line
    trained = run(*shlex.split(line), "--epochs", 1, "--batch-size", 2, "--json")
    assert trained.data["epochs"] == 1


def test_what_to_run_next_names_a_dataset_that_its_preset_does_not(tmp_path, monkeypatch):
    """`prepare` calls it after its folder, `train` after its preset."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "mine"
    for number in range(12):
        helpers.write_array(root / f"{number}.npy", np.full(4, number % 2, np.float32))
    rows = [
        {"id": n, "domain": "ab"[n // 6], "split": "train" if n % 6 < 4 else "test", "label": n % 2, "x": f"{n}.npy"}
        for n in range(12)
    ]
    helpers.write_manifest(root / "manifest.csv", rows)
    (tmp_path / "recipe.toml").write_text("[dataset]\nclasses = 2\n")
    shown = " ".join(run("prepare", "manifest", "--root", "mine", "--preset", "recipe.toml").stderr.split())
    (line,) = re.findall(r"Next: mbcd (train .*)", shown)
    assert run(*shlex.split(line), "--max-steps", 1, "--batch-size", 2, "--json").data["steps"] == 1


def test_what_to_run_next_holds_no_domain_out_where_there_is_one(capsys):
    show_prepared(
        Prepared("one", "cache", 2, ["here"], "here", 2, {}, [], [], 0), preset=None, repeat=["--dataset", "one"]
    )
    assert capsys.readouterr().err.split("Next: ")[1] == "mbcd train --dataset one\n"


def test_the_target_to_begin_with_and_what_check_cannot_know(tmp_path):
    """A target that is only ever tested, else one that can be tested; --check counts what the audit will leave out."""
    helpers.write_array(tmp_path / "x.npy", np.ones(3, np.float32))
    splits = {"only tested": ["test"], "both": ["train", "test"], "only trained on": ["train"]}
    rows = [
        {"id": f"{domain} {split}", "domain": domain, "split": split, "label": 0, "x": "x.npy"}
        for domain, there in splits.items()
        for split in there
    ]
    helpers.write_manifest(tmp_path / "manifest.csv", rows)
    words = ["prepare", "manifest", "--root", tmp_path, "--cache-dir", tmp_path / "cache", "--json"]
    report = run(*words, "--check", "--set", "dataset.leave_out=audit").data
    assert any("leave_out" in line for line in report["warnings"])
    two = ["--set", "dataset.domains=['both', 'only trained on']"]
    assert run(*words).data["target"] == "only tested"
    train = ["train", "--dataset", tmp_path.name, "--cache-dir", tmp_path / "cache", "--run", tmp_path / "run"]
    train += ["--batch-size", 1, "--max-steps", 1, "--target-domain"]
    said = run(*train, "both", code=1).stderr
    assert "Its table has none: choose other domains with --source-domains." in said
    whole = ["--source-domains", "both", "--set", "dataset.target_split=all"]
    said = run(*train, "only trained on", *whole, code=1).stderr
    assert "no test views of the training clips of the target 'only trained on'" in said
    assert not (tmp_path / "run" / "settings.toml").exists()
    assert run(*words, *two).data["target"] == "both"
    assert run(*words, *two, "--set", "dataset.target_split=all").data["target"] == "only trained on"


def test_empty_files_are_missing_and_tried_ones_that_fail_are_told(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")
    (root / "video" / "alpha_0_0.mp4").write_bytes(b"")
    for path in (root / "audio").glob("*.wav"):
        path.write_bytes(b"no sound")
    arguments = ("prepare", "manifest", "--root", root, "--cache-dir", tmp_path / "cache", *SETS)
    report = run(*arguments, "--check", "--json", code=3).data
    (gap,) = report["modalities"]["video"]["gaps"]
    assert gap["clip"] == "alpha_0_0"
    bad = report["modalities"]["audio"]["unusable"]
    assert bad
    assert report["clips_to_be_rejected"] == len({one["clip"] for one in bad} | {"alpha_0_0"})
    shown = " ".join(run(*arguments, "--check", code=3).stderr.split())
    assert f"{bad[0]['clip']}, which was tried, cannot be used" in shown


def test_missing_files_predict_the_exit_code(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")
    (root / "video" / "alpha_0_0.mp4").unlink()
    arguments = ("prepare", "manifest", "--root", root, "--cache-dir", tmp_path / "cache", *SETS, "--json")
    report = run(*arguments, "--check", code=3).data
    assert report["clips_to_be_rejected"] == 1
    (gap,) = report["modalities"]["video"]["gaps"]
    assert gap["clip"] == "alpha_0_0"
    assert gap["first"].endswith("video/alpha_0_0.mp4")
    assert run(*arguments, "--check", "--max-bad", 1).data["exit_code"] == 0
    assert not (tmp_path / "cache").exists()
    assert len(run(*arguments, code=3).data["rejected"]) == 1
    shown = run(*(a for a in arguments if a != "--json"), "--check", code=3)
    assert "12 clips, 8 train + 4 test" in shown.stdout
    assert "alpha_0_0 lacks 1 of 1" in shown.stderr
    assert "error: `prepare` would end with exit code 3" in shown.stderr
    assert "--max-bad 1" in shown.stderr


def test_every_gap_is_in_the_json_and_the_first_ones_are_shown(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")
    for path in (root / "video").iterdir():
        path.unlink()
    arguments = ("prepare", "manifest", "--root", root, "--cache-dir", tmp_path / "cache", *SETS, "--check")
    report = run(*arguments, "--json", code=3).data
    assert len({gap["clip"] for gap in report["modalities"]["video"]["gaps"]}) == 12
    shown = run(*arguments, code=3).stderr
    assert shown.count(" lacks 1 of 1, first ") == 5
    assert "video: ... and 7 more clips" in shown
    assert "No clip of video could be timed" in shown


def test_weights_and_room_are_checked_beforehand(root, tmp_path, monkeypatch):
    settings = tree(root, tmp_path, "modalities.video.cut=layer3", "model.modalities=video")
    report = check(settings)
    assert report.exit_code == 1
    assert not report.modalities["video"].weights.present
    sets = ("--set", "modalities.video.cut=layer3", "--modalities", "video")
    common = ("prepare", "manifest", "--root", root, "--cache-dir", tmp_path / "cache", *SETS, *sets, "--check")
    shown = run(*common, code=1).stderr
    assert "error: `prepare` would stop, since it lacks the weights of video." in shown
    (tmp_path / "own.pth").write_text("another file")
    own = ("--set", "modalities.video.weights=own.pth", "--set", "modalities.video.weights_sha256=0dd54025")
    shown = run(*common, *own, "--weights-dir", tmp_path, code=1).stderr
    assert "own.pth: its SHA-256 begins with" in shown
    assert "get it again" in shown
    told = run(*common, *own, "--weights-dir", tmp_path, "--json", code=1).data["modalities"]["video"]["weights"]
    assert not told["present"]
    assert told["file"] == str(tmp_path / "own.pth")
    assert told["sha256"] == hashlib.sha256(b"another file").hexdigest()
    monkeypatch.setattr("mbcd_cli.preparation.check.free_bytes", lambda folder: 10)
    report = check(tree(root, tmp_path, "model.modalities=video"))
    assert (report.fits, report.exit_code) == (False, 1)
    shown = run(*common[:-1], "--random-weights", "--check", code=1).stderr
    assert "does not fit. Free some space" in " ".join(shown.split())


def test_single_missing_frames_are_mended_or_not(tmp_path):
    epic.frame_folders(tmp_path)
    epic.write_tables(tmp_path / "splits")
    (tmp_path / "rgb/train/D1/P08_01/frame_0000000005.jpg").unlink()
    common = ("prepare", "epic-kitchens", "--root", tmp_path, "--random-weights", "--check", "--json")
    report = run(*common).data
    assert report["modalities"]["video"]["incomplete"] == 1
    assert report["modalities"]["video"]["gaps"][0]["first"].endswith("frame_0000000005.jpg")
    assert report["clips_to_be_rejected"] == 0
    assert any("frame folders" in line for line in report["layout"])
    assert any("2 clips where the published split has 1543" in line for line in report["warnings"])
    assert run(*common, "--missing-frames", "reject", code=3).data["clips_to_be_rejected"] == 1
    for path in (tmp_path / "flow/test/D2/P01_02/v").iterdir():
        path.unlink()
    (tmp_path / "flow/test/D2/P01_02/v").rmdir()
    report = run(*common, code=3).data
    assert report["clips_to_be_rejected"] == 2  # a whole direction cannot be mended
    counts = {gap["clip"]: (gap["missing"], gap["expected"]) for gap in report["modalities"]["flow"]["gaps"]}
    assert set(counts.values()) == {(6, 12), (8, 16)}


@epic.needs_tables
def test_epic_in_full(tmp_path):
    """The real tables: counts, and the exact bytes of the paper's encoders at the cut."""
    epic.touch_all_clips(tmp_path)
    report = run(
        *("prepare", "epic-kitchens", "--root", tmp_path, "--random-weights", "--check", "--json"),
        *("--set", f"dataset.reader.splits={epic.REAL}", "--cache-dir", tmp_path / "cache"),
        code=None,
    ).data
    assert report["splits"] == {"train": 7935, "test": 2159}
    assert report["domains"]["D3"] == {"train": 3897, "test": 974}
    assert report["warnings"] == []
    views = {"train": 4 * 7935, "test": 2159}
    assert {name: one["views"] for name, one in report["modalities"].items()} == dict.fromkeys(
        ("video", "audio", "flow"), views
    )
    per_view = {"video": (4_816_896, 4_816_896), "audio": (548_352, 548_352), "flow": (3_211_264, 4_194_304)}
    for name, (train, test) in per_view.items():
        one = report["modalities"][name]
        assert one["bytes_per_view"] == {"train": train, "test": test}
        assert one["bytes"] == train * views["train"] + test * views["test"]
        assert one["complete"] == 10094
    assert report["modalities"]["video"]["trunk_gflop"]["train"] == pytest.approx(170.3, abs=0.5)


@pytest.mark.skipif(not hac.REAL.is_dir(), reason="the HAC split tables are not beside the clone")
def test_hac_in_full(tmp_path):
    for domain in hac.DOMAINS:
        for kind in ("videos", "flow", "audio"):
            (tmp_path / domain / kind).mkdir(parents=True)
        for split in ("train", "test"):
            with (hac.REAL / f"HAC_{split}_only_{domain}.csv").open(newline="") as stream:
                for name, _ in csv.reader(stream):
                    (tmp_path / domain / "videos" / name).write_bytes(b"x")
                    for direction in "xy":
                        (tmp_path / domain / "flow" / f"{name[:-4]}_flow_{direction}.mp4").write_bytes(b"x")
                    (tmp_path / domain / "audio" / f"{name[:-4]}.wav").write_bytes(b"x")
    report = run(
        *("prepare", "hac", "--root", tmp_path, "--random-weights", "--check", "--json"),
        *("--set", f"dataset.reader.splits={hac.REAL}", "--cache-dir", tmp_path / "cache"),
        code=None,
    ).data
    assert report["clips"] == 3381
    assert {name: one["complete"] for name, one in report["modalities"].items()} == dict.fromkeys(
        ("video", "audio", "flow"), 3381
    )
    # With target_split = "all" every clip has the test view besides its training views.
    assert report["modalities"]["video"]["views"] == {"train": 4 * 2711, "test": 3381}
