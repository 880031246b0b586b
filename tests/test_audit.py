"""The audit: what tables, media and caches tell of a dataset; near copies against brute force; leaving leaks out."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import cv2
import helpers
import numpy as np
import pytest
from commands import run

from mbcd_cli.audit.audit import audit, leaks_of
from mbcd_cli.audit.copies import (
    OF_FRAMES,
    candidates,
    correlation,
    covered,
    emphasised,
    near_pairs,
    of_all_modalities,
)
from mbcd_cli.audit.findings import Copies, LabelCounts, Recording
from mbcd_cli.audit.listed import overlaps, scarce_classes, shared_names, shared_recordings
from mbcd_cli.audit.prints import MIRROR, Print, marks_of, sound_marks, unit
from mbcd_cli.data.clips import Clips
from mbcd_cli.data.modalities import default_modality
from mbcd_cli.data.readers import NoMediaError, read_dataset
from mbcd_cli.data.records import Clip, Media
from mbcd_cli.resolved import resolve
from mbcd_cli.settings import DatasetSettings

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def picture(seed: int, count: int = 12) -> np.ndarray:
    """[count, 64, 64, 3] uint8: a blob or two that move."""
    return helpers.moving_texture(count, dx=1.5, dy=0.5 * (seed % 3), seed=seed)


def speech(seed: int, seconds: float = 0.6) -> np.ndarray:
    """Bursts of gliding tones, [S] at 8 kHz."""
    rng, count = np.random.default_rng(seed), round(8000 * seconds)
    at = np.linspace(0, 1, count)
    loud = np.interp(at, np.linspace(0, 1, 7), rng.uniform(0.02, 1, 7))
    hertz = np.interp(at, np.linspace(0, 1, 5), rng.uniform(150, 1500, 5))
    return 0.4 * loud * np.sin(2 * np.pi * hertz.cumsum() / 8000)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """Ten clips, and copies: the same bytes, the same frames in another container, cut, mirrored, louder, noisy."""
    root, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    made = {f"c{seed}": (picture(seed), speech(seed)) for seed in range(10)}
    made["cut"] = made["c1"][0][2:-1], made["c1"][1][700:-300]
    made["mirrored"] = made["c2"][0][:, :, ::-1], -made["c2"][1]
    brighter = np.clip(0.8 * made["c3"][0] + 20 + rng.normal(0, 4, made["c3"][0].shape), 0, 255).astype(np.uint8)
    made["louder"] = brighter, 1.6 * made["c3"][1]
    small = np.stack([cv2.resize(frame, (48, 48)) for frame in made["c4"][0]])
    made["noisy"] = small, made["c4"][1] + 0.01 * rng.normal(size=len(made["c4"][1]))
    made["black"] = np.zeros((8, 64, 64, 3), np.uint8), np.zeros(4000)
    made["still"] = np.repeat(picture(77, 1), 8, axis=0), speech(77)
    rows = []
    for name, (frames, samples) in made.items():
        helpers.write_video(root / f"{name}.mp4", frames)
        helpers.write_wav(root / f"{name}.wav", samples)
        rows.append(row(name, "train" if name.startswith("c") and name != "cut" else "test"))
    for suffix in ("mp4", "wav"):
        (root / f"bytes.{suffix}").write_bytes((root / f"c0.{suffix}").read_bytes())
        (root / f"broken.{suffix}").write_bytes(b"nothing that plays")
    rows += [row("bytes", "test", domain="b"), row("broken", "train", domain="b"), row("again", "test", file="c5")]
    helpers.write_manifest(root / "manifest.csv", rows)
    return root


def row(name: str, split: str, *, domain: str = "a", file: str = "") -> dict[str, object]:
    file = file or name
    where = {"video": f"{file}.mp4", "audio": f"{file}.wav"}
    return {"id": name, "domain": domain, "split": split, "label": len(name) % 2, **where}


def test_planted_copies_are_found_and_no_others(planted, tmp_path):
    found = run(
        *("audit", "manifest", "--root", planted, "--cache-dir", tmp_path, "--set", "cache.workers=1"),
        *("--csv", tmp_path / "tables", "--json"),
        code=3,
    ).data
    told = {frozenset(copies["clips"]): set() for copies in found["copies"]}
    for copies in found["copies"]:
        told[frozenset(copies["clips"])] |= {(copies["how"], name) for name in copies["modalities"]}
    both = ("video", "audio")
    assert told == {
        frozenset(("c0", "bytes")): {("same bytes", name) for name in both},
        frozenset(("c5", "again")): {("same file", name) for name in both},
        frozenset(("c1", "cut")): {("near", name) for name in both},
        frozenset(("c2", "mirrored")): {("mirrored", "video"), ("near", "audio")},
        frozenset(("c3", "louder")): {("near", name) for name in both},
        frozenset(("c4", "noisy")): {("near", name) for name in both},
    }
    assert {copies["across"] for copies in found["copies"]} == {"train and test"}
    assert [leak["clip"] for leak in found["leaks"]] == ["c0", "c1", "c2", "c3", "c4", "c5"]
    constant = {(c["clip"], c["modality"]): c["what"] for c in found["constant"]}
    assert constant == {
        ("black", "video"): "frames of one colour",
        ("black", "audio"): "sound that does not change",
        ("still", "video"): "frames that do not change",
    }
    assert [(bad["clip"], bad["modality"]) for bad in found["rejected"]] == [("broken", "video"), ("broken", "audio")]
    assert found["looked_at"] == {"video": 18, "audio": 18}


def test_the_command_shows_tables(planted, tmp_path):
    shown = run(
        *("audit", "manifest", "--root", planted, "--cache-dir", tmp_path, "--max-bad", 1, "--workers", 0),
        *("--csv", tmp_path / "tables"),
    )
    for text in ("looked at video of 18", "same bytes", "frames of one colour", "dataset.leave_out=audit", "c0"):
        assert text in shown.stdout + shown.stderr
    assert "not prepared" in shown.stdout
    assert "6-training-clips-tell-of-test-clips.csv" in {path.name for path in (tmp_path / "tables").iterdir()}


def test_what_leaks_is_left_out_and_recorded(planted, tmp_path):
    """Prepared, verified, damaged and repaired; another `leave_out` is another cache."""
    sets = [part for one in helpers.SMALL for part in ("--set", one)]
    common = ("prepare", "manifest", "--root", planted, "--cache-dir", tmp_path, *sets, "--max-bad", 1, "--json")
    whole = run(*common).data
    done = run(*common, "--set", "dataset.leave_out=audit").data
    assert [leak["clip"] for leak in done["left_out"]] == ["c0", "c1", "c2", "c3", "c4", "c5"]
    assert whole["left_out"] == []
    assert done["clips"] == whole["clips"] - 6
    table = (tmp_path / planted.name / "left-out.csv").read_text()
    assert "c1,cut,near (video, audio)" in table.replace('"', "")
    folder = Path(done["modalities"]["video"]["folder"])
    assert folder.name != Path(whole["modalities"]["video"]["folder"]).name
    assert '"c5"' in (folder / "prepare.toml").read_text()
    run("verify", tmp_path)
    for file in ("shard-00000.h5", "index.h5"):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(before[:-100])
        run("verify", tmp_path, code=1)
        run("repair", folder)
        run("verify", tmp_path)
    again = run(*common, "--set", "dataset.leave_out=audit").data["modalities"]["video"]
    assert again["shards_reused"] == again["shards"]
    training = ("train", "--dataset", planted.name, "--cache-dir", tmp_path, "--max-steps", 1, *sets)
    training += ("--set", "training.batch_size=2")
    run(*training, "--source-domains", "a", "--run", tmp_path / "r", "--set", "dataset.leave_out=audit")


def test_near_vectors_by_cosine(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 24)).astype(np.float32) * 50 + 300
    vectors[30], vectors[31] = vectors[3], vectors[4] + rng.normal(0, 1, 24)
    vectors[32] = 7.0
    np.save(tmp_path / "all.npy", vectors)
    rows = [
        {"id": f"v{i}", "domain": "ab"[i % 2], "split": "train", "label": 0, "array": f"all.npy#{i}"} for i in range(40)
    ]
    helpers.write_manifest(tmp_path / "manifest.csv", rows)
    found = audit(resolve(flags={"dataset.root": tmp_path, "cache.dir": tmp_path / "cache"}))
    assert [(c.how, c.clips, c.across) for c in found.copies] == [
        ("same content", ("v3", "v30"), "domains"),
        ("near", ("v4", "v31"), "domains"),
    ]
    assert [c.clip for c in found.constant] == ["v32"]
    assert found.leaks == []


def test_the_probe_tells_domains_that_differ(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(80):
        domain, split = "ab"[i % 2], ("train", "test")[i % 8 == 0]
        vector = rng.normal(size=8) + (i % 2) * np.array([4, *[0] * 7])
        helpers.write_array(tmp_path / f"{i}.npy", vector.astype(np.float32))
        rows.append({"id": f"v{i}", "domain": domain, "split": split, "label": 0, "array": f"{i}.npy"})
        helpers.write_array(tmp_path / f"n{i}.npy", rng.normal(size=(5, 8)).astype(np.float32))
        rows[-1]["features"] = f"n{i}.npy"
    helpers.write_manifest(tmp_path / "manifest.csv", rows)
    run("prepare", "manifest", "--root", tmp_path, "--cache-dir", tmp_path / "cache", "--name", "probed")
    probes = run(
        *("audit", "manifest", "--root", tmp_path, "--cache-dir", tmp_path / "cache", "--name", "probed", "--json")
    ).data["probes"]
    told = {probe["modality"]: probe for probe in probes}
    assert told["array"]["accuracy"] > 0.9
    assert told["features"]["accuracy"] < 0.75
    assert told["array"]["chance"] == 1 / 2


# --- against brute force ---------------------------------------------------------------------------------------------


def prints_of(count: int, rng: np.random.Generator) -> list[Print]:
    """Pictures that drift, some of them near copies of others, some mirrored."""
    smooth = [cv2.GaussianBlur(rng.normal(size=(32, 32)), (0, 0), 4) for _ in range(count)]
    marks = [marks_of(np.stack([np.roll(one, shift, axis=1) for shift in range(6)])) for one in smooth]
    for at in range(0, count, 5):
        marks[at] = unit(marks[at + 1] * (MIRROR if at % 2 else 1) + rng.normal(0, 0.01, marks[at].shape))
    return [Print("", "", "", rows.astype(np.float32), np.empty(0, np.int8)) for rows in marks]


def test_the_tree_finds_what_all_pairs_give():
    prints = prints_of(120, np.random.default_rng(1))
    found = {(a, b): how for a, b, how, _ in near_pairs(prints, default_modality("video"))}
    expected = {}
    for a, b in combinations(range(len(prints)), 2):
        values = {
            how: covered(prints[a].marks, sign * prints[b].marks) for how, sign in (("near", 1), ("mirrored", MIRROR))
        }
        how = max(values, key=values.get)
        if values[how] >= OF_FRAMES.least:
            expected[a, b] = how
    assert found == expected
    assert set(expected.values()) == {"near", "mirrored"}


def test_projected_marks_lose_no_candidate():
    """Every pair with two marks within reach, where the nearest are few enough to be all kept."""
    rng = np.random.default_rng(2)
    marks = [unit(rng.normal(size=(2, 30))) for _ in range(40)]
    marks[7] = unit(marks[3] + 0.03 * rng.normal(size=(2, 30)))
    nearness = replace(OF_FRAMES, asked=2)
    expected = [
        [a, b]
        for a, b in combinations(range(40), 2)
        if np.linalg.norm(marks[a][:, None] - marks[b][None], axis=-1).min() < nearness.reach
    ]
    assert expected
    got = candidates(marks, marks, nearness).tolist()
    assert [pair for pair in expected if pair not in got] == []


def test_correlation_against_numpy():
    rng = np.random.default_rng(3)
    for _ in range(5):
        a, b = emphasised(rng.normal(size=90)), emphasised(rng.normal(size=140))
        best = 0.0
        for shift in range(1 - len(a), len(b)):
            x, y = a[max(0, -shift) : len(b) - shift], b[max(0, shift) : shift + len(a)]
            if min((x**2).sum(), (y**2).sum()) >= 0.5:
                best = max(best, cosine(x, y))
        assert correlation(a, b) == pytest.approx(best, abs=1e-5)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return abs(float(x @ y)) / float(np.sqrt((x @ x) * (y @ y)))


def test_short_and_empty_sounds_have_marks():
    for samples in (1, 20, 300, 5000):
        marks = sound_marks(np.arange(samples).astype(np.int8))
        assert np.isfinite(marks).all()
        assert marks.shape[1] == sound_marks(np.ones(1, np.int8)).shape[1]


def test_a_mirrored_frame_has_the_mirrored_mark():
    pictures = np.random.default_rng(0).random((3, 32, 32))
    np.testing.assert_allclose(marks_of(pictures[:, :, ::-1]), MIRROR * marks_of(pictures), atol=1e-6)


# --- tables ----------------------------------------------------------------------------------------------------------


def clip(name: str, domain: str, split: str, label: int, group: str = "", span=None, path: str = "") -> Clip:
    return Clip(name, domain, split, label, str(label), {"video": Media(Path(path or f"{name}.mp4"))}, group, span)


def test_recordings_overlaps_and_names():
    clips = Clips(
        [
            clip("w", "x", "train", 0, path="x/7.mp4"),
            clip("a", "x", "train", 0, "r1", (0, 10)),
            clip("b", "x", "train", 1, "r1", (10, 20)),
            clip("c", "x", "train", 1, "r1", (15, 18)),
            clip("d", "y", "test", 0, "r1", (16, 40)),
            clip("e", "y", "test", 0, path="y/7.mp4"),
            clip("f", "y", "train", 0, "r2"),
        ]
    )
    assert shared_recordings(clips) == [Recording("r1", ("x", "y"), ("a", "b", "c"), ("d",))]
    pairs = overlaps(clips, ("0", "1"))
    assert [(o.clips, round(o.share, 3), o.domain, o.split, o.across) for o in pairs] == [
        (("b", "d"), 0.4, "x, y", "train and test", "train and test"),
        (("c", "d"), 0.667, "x, y", "train and test", "train and test"),
    ]
    assert [(s.domains, s.names) for s in shared_names(clips, "video")] == [(("x", "y"), ("7",))]
    assert [leak.clip for leak in leaks_of(clips, [], shared_recordings(clips))] == ["a", "b", "c"]
    assert clips[1].span == (0, 10)
    assert clips[0].span is None
    assert clips[1].group == "r1"


def test_copies_of_several_modalities_are_one():
    video = Copies(("video",), "near", 0.99, ("a", "b"), "")
    (one,) = of_all_modalities([video, replace(video, modalities=("audio",), likeness=0.995)])
    assert (one.modalities, one.likeness) == (("video", "audio"), 0.995)


def test_scarce_classes():
    counts = [LabelCounts("d", "train", (9, 4, 0), None), LabelCounts("d", "test", (0, 0, 0), None)]
    told = [(s.split, s.label_name, s.clips) for s in scarce_classes(counts, ("a", "b", "c"))]
    assert told == [("train", "b", 4), ("train", "c", 0), ("test", "every class", 0)]


def test_a_manifest_names_recordings(tmp_path):
    rows = [
        {
            "id": "a",
            "domain": "x",
            "split": "train",
            "label": 0,
            "group": "r",
            "video": "a.mp4",
            "start": "",
            "stop": "",
        },
        {"id": "b", "domain": "x", "split": "test", "label": 0, "group": "", "start": 1, "stop": 2},
    ]
    rows = [{**row, "video": "a.mp4"} for row in rows]
    helpers.write_manifest(tmp_path / "manifest.csv", rows)
    clips = read_dataset(DatasetSettings(root=tmp_path), {}).clips
    assert [(c.group, c.span) for c in clips] == [("r", None), ("a.mp4", (1, 2))]


def test_wrong_input_is_one_message(tmp_path):
    assert "does not exist" in run("audit", "manifest", "--root", tmp_path / "none", code=1).stderr
    (tmp_path / "manifest.csv").write_text("id,domain\n")
    assert "the header lacks" in run("audit", "manifest", "--root", tmp_path, code=1).stderr


# --- the published tables -------------------------------------------------------------------------------------------


def of_tables(reader: str, folder: str):
    root = SHARED / folder
    if not root.is_dir():
        pytest.skip(f"the tables of {folder} are not beside the clone")
    with pytest.raises(NoMediaError):
        read_dataset(DatasetSettings(reader=reader, root=root), {})
    return run("audit", reader, "--root", root, "--cache-dir", root / "none", "--json").data


def test_hac_tables():
    found = of_tables("hac", "hac-splits")
    assert found["looked_at"] == {}
    assert "media: none are below" in found["not_looked_at"][0]
    same = [copies for copies in found["copies"] if copies["how"] == "same file"]
    assert len(same) == 24
    assert all(clip.startswith("human-") for copies in same for clip in copies["clips"])
    tests = [
        clip for recording in found["recordings"] if "animal" in recording["domains"] for clip in recording["test"]
    ]
    assert len(tests) == 10
    assert [(shared["domains"], len(shared["names"])) for shared in found["names"]] == [(["animal", "cartoon"], 693)]
    assert len(found["leaks"]) == 47


def test_epic_tables():
    found = of_tables("epic-kitchens", "mm-sada-splits")
    pairs = [(o["domain"], o["split"]) for o in found["overlaps"]]
    assert [pairs.count((domain, "train")) for domain in ("D1", "D2", "D3")] == [246, 487, 954]
    scarce = [(s["domain"], s["split"], s["label_name"], s["clips"]) for s in found["scarce"]]
    assert scarce == [("D3", "test", "stir", 1)]
    assert found["leaks"] == []
