"""The manifest reader: what tables it takes, and that it names every bad line at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import (
    AV_DIGITS,
    frame_numbers,
    needs_av_digits,
    numbered_frames,
    tone,
    write_dataset,
    write_frames,
    write_manifest,
    write_video,
    write_wav,
)

from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.modalities import default_modality
from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.modality import load_views
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.readers import READERS, Listing, read_dataset
from mbcd_cli.data.readers.manifest import read
from mbcd_cli.data.records import Clip, Media
from mbcd_cli.errors import ManifestError, MediaError, SettingsError
from mbcd_cli.settings import DatasetSettings, ManifestSettings


def table(path: str) -> ManifestSettings:
    return ManifestSettings(manifest=Path(path))


def row(number: int, **changes) -> dict[str, object]:
    """A sound row; clips 0 and 1 are of domain a (train, test), 2 and 3 of b."""
    base = {
        "id": f"c{number}",
        "domain": "ab"[number // 2 % 2],
        "split": ("train", "test")[number % 2],
        "label": number % 2,
        "video": f"v/{number}.mp4",
        "audio": f"a/{number}.wav",
    }
    return {**base, **changes}


def listing(tmp_path: Path, rows, *, modalities=None, columns=None, **settings) -> Listing:
    write_manifest(tmp_path / "manifest.csv", rows, columns)
    return read(DatasetSettings(root=tmp_path, **settings), modalities or {})


def problems(tmp_path: Path, rows=None, *, text: bytes | None = None, modalities=None, columns=None, **settings) -> str:
    """What the reader says is wrong."""
    if text is not None:
        (tmp_path / "manifest.csv").write_bytes(text)
    else:
        write_manifest(tmp_path / "manifest.csv", rows, columns)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ManifestError) as caught:
        read(DatasetSettings(root=tmp_path, **settings), modalities or {})
    assert caught.value.remedy
    assert "manifest.csv" in caught.value.message
    assert sorted(tmp_path.iterdir()) == before
    return caught.value.message


def bad_lines(message: str) -> list[int]:
    return sorted({int(line.split()[1].rstrip(":")) for line in message.splitlines() if line.startswith("  line ")})


FOUR = [row(n) for n in range(4)]


def test_a_sound_table(tmp_path):
    got = listing(tmp_path, FOUR)
    assert got.name == tmp_path.name
    assert got.domains == ("a", "b")
    assert got.label_names == ("0", "1")
    assert list(got.modalities) == ["video", "audio"]
    assert got.modalities["video"] == VideoModality()
    assert got.warnings == got.notes == got.rejected == []
    assert got.clips[1] == Clip(
        "c1", "a", "test", 1, "1", {"video": Media(tmp_path / "v/1.mp4"), "audio": Media(tmp_path / "a/1.wav")}
    )


def test_fusion_order_and_any_number_of_modalities(tmp_path):
    rows = [
        {**r, "flow": f"f/{r['id']}_u.mp4", "pose": f"p/{r['id']}.npy", "video_left": f"l/{r['id']}.mp4"} for r in FOUR
    ]
    columns = ["pose", "video_left", "flow", "label", "audio", "split", "video", "id", "domain"]
    got = listing(tmp_path, rows, columns=columns)
    assert list(got.modalities) == ["video", "audio", "flow", "pose", "video_left"]
    kinds = [m.kind for m in got.modalities.values()]
    assert kinds == ["video", "audio", "flow", "array", "video"]


def test_asked_modalities_choose_columns_and_set_kinds(tmp_path):
    rows = [{**r, "gaze": f"g/{r['id']}.bin"} for r in FOUR]
    assert "unknown column 'gaze'" in problems(tmp_path, rows)
    assert "--set modalities.gaze.kind=" in problems(tmp_path, rows)
    asked = {"gaze": ArrayModality(dimension=3), "audio": AudioModality(samples=4000)}
    got = listing(tmp_path, rows, modalities=asked)
    assert list(got.modalities) == ["audio", "gaze"]
    assert got.modalities["audio"].samples == 4000
    assert set(got.clips[0].media) == {"audio", "gaze"}
    assert got.notes == ["columns not asked for: video (--modalities gaze,audio,video takes them too)"]


def test_label_names_domains_and_their_order(tmp_path):
    rows = [{**r, "label_name": ("open", "close")[r["label"]]} for r in FOUR]
    assert listing(tmp_path, rows).label_names == ("open", "close")
    got = listing(tmp_path, rows, domains=("b", "a"))
    assert got.domains == ("b", "a")
    only = listing(tmp_path, rows, domains=("b",))
    assert [c.id for c in only.clips] == ["c2", "c3"]
    message = problems(tmp_path, rows, domains=("b", "z"))
    assert "no domain 'z'" in message


def test_unknown_domain_names_the_known_ones(tmp_path):
    write_manifest(tmp_path / "manifest.csv", FOUR)
    with pytest.raises(ManifestError, match=r"Did you mean b\? It has: a, b"):
        read(DatasetSettings(root=tmp_path, domains=("bb",)), {})


def test_names_of_datasets(tmp_path):
    root = tmp_path / "my data"
    write_manifest(root / "tables" / "small.csv", FOUR)
    write_manifest(root / "manifest.csv", FOUR)
    assert read(DatasetSettings(root=root), {}).name == "my-data"
    assert read(DatasetSettings(root=root, reader=table("tables/small.csv")), {}).name == "my-data-small"
    assert read(DatasetSettings(root=root, name="digits"), {}).name == "digits"


def test_classes_without_clips_are_a_warning(tmp_path):
    got = listing(tmp_path, FOUR, classes=4)
    assert got.label_names == ("0", "1", "2", "3")
    assert got.warnings == ["2 of 4 classes have no clips: 2, 3"]


@pytest.mark.parametrize(
    ("names", "unit"),
    [(("start", "stop"), "s"), (("start_s", "stop_s"), "s"), (("start_frame", "stop_frame"), "frame")],
)
def test_spans(tmp_path, names, unit):
    rows = [{**r, names[0]: "4", names[1]: "12"} for r in FOUR]
    rows[1][names[1]] = ""
    rows[2][names[0]] = rows[2][names[1]] = ""
    got = listing(tmp_path, rows).clips
    assert got[0].media["video"] == Media(tmp_path / "v/0.mp4", start=4, stop=12, unit=unit)
    assert got[1].media["video"] == Media(tmp_path / "v/1.mp4", start=4, unit=unit)
    assert got[2].media["video"] == Media(tmp_path / "v/2.mp4")
    clock = tmp_path / "v/0.mp4" if unit == "frame" else None
    assert got[0].media["audio"] == Media(tmp_path / "a/0.wav", start=4, stop=12, unit=unit, clock=clock)


def test_bad_spans(tmp_path):
    rows = [{**row(n), "start": "1", "stop": "2"} for n in range(6)]
    rows[0]["start"], rows[1]["stop"], rows[2]["start"], rows[3]["stop"] = "x", "-1", "2", "inf"
    assert bad_lines(problems(tmp_path, rows)) == [2, 3, 4, 5]
    both = [{**r, "start": 1, "stop_frame": 2} for r in FOUR]
    assert "in seconds and in frames" in problems(tmp_path, both)
    twice = [{**r, "start": 1, "start_s": 2} for r in FOUR]
    assert "given twice" in problems(tmp_path, twice)
    sound = [{k: v for k, v in r.items() if k != "video"} | {"start_frame": 1, "stop_frame": 5} for r in FOUR]
    assert "needs a video column" in problems(tmp_path, sound)


@pytest.mark.parametrize(
    ("cell", "second"),
    [
        ("f/x_flow_x.mp4", "f/x_flow_y.mp4"),
        ("f/clip_u.mp4", "f/clip_v.mp4"),
        ("flow/u/clip.mp4", "flow/v/clip.mp4"),
        ("flow/clip/u", "flow/clip/v"),
        ("u/u_1/u/frames", "u/u_1/v/frames"),
        ("a.mp4|b.mp4", "b.mp4"),
        ("f/clip.npy", None),
    ],
)
def test_flow_cells(tmp_path, cell, second):
    got = listing(tmp_path, [{**r, "flow": cell} for r in FOUR]).clips[0].media["flow"]
    assert got.path == tmp_path / cell.split("|")[0]
    assert got.path_v == (None if second is None else tmp_path / second)


def test_flow_folder_that_holds_u_and_v(tmp_path):
    got = listing(tmp_path, [{**r, "flow": "flow/P08_01"} for r in FOUR]).clips[0].media["flow"]
    assert (got.path, got.path_v) == (tmp_path / "flow/P08_01/u", tmp_path / "flow/P08_01/v")


def test_computed_flow(tmp_path):
    got = listing(tmp_path, FOUR, compute_flow=True)
    assert list(got.modalities) == ["video", "audio", "flow"]
    assert got.clips[0].media["flow"] == Media(tmp_path / "v/0.mp4", computed=1)
    asked = {"flow": FlowModality(frames=4)}
    only = listing(tmp_path, FOUR, modalities=asked, compute_flow=True)
    assert list(only.modalities) == ["flow"]
    assert only.clips[0].media["flow"].computed
    message = problems(tmp_path, FOUR, modalities=asked)
    assert "no column for modality 'flow'" in message
    assert "--compute-flow" in message
    stored = listing(tmp_path, [{**r, "flow": "f_u.mp4"} for r in FOUR], compute_flow=True)
    assert not stored.clips[0].media["flow"].computed
    outside = [{**r, "video": "../x.mp4"} for r in FOUR]
    assert bad_lines(problems(tmp_path, outside, modalities=asked, compute_flow=True)) == [2, 3, 4, 5]


BAD = {
    "a duplicate id": ({"id": "c0"}, "already on line 2"),
    "an empty id": ({"id": ""}, "id is empty"),
    "an id with a slash": ({"id": "a/b"}, "cannot serve as a name"),
    "an id that hides": ({"id": "..b"}, "cannot serve as a name"),
    "an id like an option": ({"id": "-x"}, "cannot serve as a name"),
    "a control character": ({"id": "a\x07"}, "cannot serve as a name"),
    "an empty domain": ({"domain": " "}, "domain is empty"),
    "a domain with a comma": ({"domain": "a,b"}, "holds a comma"),
    "another split": ({"split": "Train"}, "neither train nor test"),
    "a negative label": ({"label": -1}, "out of range"),
    "a label too large": ({"label": 3}, "classes are 0 to 2"),
    "a label that is a word": ({"label": "six"}, "not an integer"),
    "a label that is a fraction": ({"label": "1.0"}, "not an integer"),
    "no label": ({"label": ""}, "not an integer"),
    "another name for a label": ({"label": 0, "label_name": "shut"}, "'n0' on line 2"),
    "another label for a name": ({"label": 2, "label_name": "n0"}, "0 on line 2"),
    "no file": ({"video": ""}, "no file is named"),
    "a path upwards": ({"audio": "a/../../x.wav"}, "leaves the dataset's root"),
    "a path upwards, otherwise": ({"audio": "..\\x.wav"}, "leaves the dataset's root"),
    "an absolute path": ({"audio": "/etc/passwd"}, "not relative"),
    "a drive": ({"audio": "C:\\x.wav"}, "not relative"),
    "a home": ({"audio": "~/x.wav"}, "not relative"),
}


@pytest.mark.parametrize("fault", BAD)
def test_one_bad_row(tmp_path, fault):
    changes, says = BAD[fault]
    rows = [{**row(n), "label_name": f"n{n % 2}"} for n in range(6)]
    rows[3] = {**rows[3], **changes}
    message = problems(tmp_path, rows, classes=3)
    assert bad_lines(message) == [5]
    assert says in message


def test_all_bad_lines_in_one_error(tmp_path):
    header = b"\xef\xbb\xbfid,domain,split,label,video\r\n"
    lines = [
        b"c0,a,train,0,v/0.mp4",
        b"c1,a,test,0,v/1.mp4",
        b"caf\xe9,a,train,0,v/2.mp4",  # 4: Latin-1
        b"",
        b'"caf\xc3\xa9, au lait",a,train,0,"v/3.mp4"',  # 6: sound
        b"c4,a,train,0",  # 7: a cell too few
        b"c5,a,train,0,v/5.mp4,more",  # 8: one too many
        b'c6,a,train,0,"v/6.mp4',  # 9: a quote left open
        b"c7,,neither,x,../7.mp4",  # 10: four faults
    ]
    message = problems(tmp_path, text=header + b"\r\n".join(lines) + b"\r\n")
    assert bad_lines(message) == [4, 7, 8, 9, 10]
    assert "5 bad lines" in message
    assert message.count("line 10:") == 4
    assert "not UTF-8 (byte 0xE9 at column 4)" in message


def test_headers(tmp_path):
    assert "lacks split, label" in problems(tmp_path, text=b"id,domain,video\nc0,a,v.mp4\n")
    assert "separated by commas" in problems(tmp_path, text=b"id;domain;split;label;video\n")
    text = b"id,domain,split,label,video\nc0,a,train,0,v\n"
    assert "modality 'vidoe'. Did you mean video?" in problems(
        tmp_path, text=text, modalities={"vidoe": default_modality("video")}
    )
    assert "there twice" in problems(tmp_path, text=b"id,domain,split,label,video,video\nc0,a,train,0,v,w\n")
    assert "has no name" in problems(tmp_path, text=b"id,domain,split,label,video,\nc0,a,train,0,v,\n")
    assert "no column of a modality" in problems(tmp_path, text=b"id,domain,split,label\nc0,a,train,0\n")
    assert "not UTF-8" in problems(tmp_path, text="id,domain,split,label,video\n".encode("utf-16"))
    for empty in (b"", b"\n\n", b"id,domain,split,label,video\n", b"id,domain,split,label,look\n"):
        assert "the manifest is empty" in problems(tmp_path, text=empty)
    missing = problems(tmp_path, FOUR, modalities={"flow": default_modality("flow"), "audio": AudioModality()})
    assert "no column for modality 'flow'" in missing


def test_splits_that_are_missing(tmp_path):
    # A domain that is only ever tested is the most natural one of domain generalization.
    got = listing(tmp_path, [row(0), row(1), row(3)])
    assert got.warnings == ["domain b has no clips of the train split: it can only be a target"]
    said = "domain b has no clips of the test split: it can only be a target"
    hint = ", by all its clips (--set dataset.target_split=all)"
    assert listing(tmp_path, [row(0), row(1), row(2)]).warnings == [said + hint]
    assert listing(tmp_path, [row(0), row(1), row(2)], target_split="all").warnings == [said]
    assert listing(tmp_path, [row(0), row(1), row(3)], domains=("a",)).domains == ("a",)


def test_missing_root_and_manifest(tmp_path):
    with pytest.raises(ManifestError, match="--root"):
        read(DatasetSettings(), {})
    with pytest.raises(ManifestError, match="does not exist"):
        read(DatasetSettings(root=tmp_path / "none"), {})
    with pytest.raises(ManifestError, match="no such manifest"):
        read(DatasetSettings(root=tmp_path), {})


def test_registry(tmp_path):
    write_manifest(tmp_path / "manifest.csv", FOUR)
    settings = DatasetSettings(root=tmp_path)
    ways = (READERS["manifest"].read, read, read_dataset)
    first, *others = [list(way(settings, {}).clips) for way in ways]
    assert others == [first, first]
    with pytest.raises(SettingsError, match="Choose one of: manifest"):
        read_dataset(DatasetSettings(reader="none"), {})
    assert all(entry.summary for entry in READERS.values())


def test_from_table_to_tensors(tmp_path):
    got = read(DatasetSettings(root=write_dataset(tmp_path / "d"), compute_flow=True), {})
    assert list(got.modalities) == ["video", "audio", "flow", "pose"]
    assert len(got.clips) == 12
    for name, settings in got.modalities.items():
        (view,) = load_views(got.clips[0], name, settings, views=[0], seed=0, dataset=DatasetSettings())
        assert np.isfinite(view[0]).all()


def test_a_span_in_frames_cuts_sound_and_picture_alike(tmp_path):
    write_video(tmp_path / "v/0.mp4", np.zeros((32, 32, 32, 3), np.uint8), fps=16)
    write_wav(tmp_path / "a/0.wav", np.concatenate([np.zeros(8000), tone(1.0, level=0.9)]))
    rows = [row(n, video="v/0.mp4", audio="a/0.wav") | {"start_frame": 0, "stop_frame": 16} for n in range(4)]
    rows[1] |= {"start_frame": 16, "stop_frame": 32}
    audio = AudioModality(samples=8000, nperseg=256, noverlap=128)
    first, second = listing(tmp_path, rows, modalities={"audio": audio}).clips[:2]
    quiet, loud = (
        load_views(clip, "audio", audio, views=[-1], seed=0, dataset=DatasetSettings())[0][0]
        for clip in (first, second)
    )
    assert not quiet.any()
    assert loud.std() == pytest.approx(1, abs=1e-3)


@needs_av_digits
def test_av_digits():
    got = read(DatasetSettings(root=AV_DIGITS), {})
    assert got.name == "av-digits"
    assert len(got.clips) == 1500
    assert got.domains == ("studio", "tilted", "street")
    assert got.label_names[:3] == ("zero", "one", "two")
    assert got.warnings == []
    assert sum(clip.split == "train" for clip in got.clips) == 1200


@needs_av_digits
def test_broken_manifest_of_av_digits():
    with pytest.raises(ManifestError) as caught:
        read(
            DatasetSettings(root=AV_DIGITS, reader=table("broken/manifest_broken.csv"), classes=10),
            {},
        )
    assert bad_lines(caught.value.message) == [6, 8, 16, 17, 24]


@needs_av_digits
def test_bad_media_of_av_digits():
    root = DatasetSettings(root=AV_DIGITS, reader=table("broken/manifest_bad_media.csv"), classes=10)
    got = read(root, {})
    assert got.name == "av-digits-manifest_bad_media"
    video, audio = VideoModality(), AudioModality(samples=8000, nperseg=256, noverlap=128)
    causes = {}
    good = 0
    for line, clip in enumerate(got.clips, start=2):
        try:
            load_views(clip, "video", video, views=[-1, 0], seed=0, dataset=root)
            load_views(clip, "audio", audio, views=[-1, 0], seed=0, dataset=root)
            good += 1
        except MediaError as error:
            causes[line] = error.cause if error.remedy else "no remedy"
    assert good == 12
    assert causes == {
        3: "635 of 3813 samples are not finite (NaN or infinity)",
        7: "cut short: its header claims 2673 samples, and 891 are there",
        8: "the file is empty (0 bytes)",
        11: "not a video or sound file that can be opened (Invalid data found when processing input)",
        12: "1 frame, fewer than the 2 needed",
        17: "cut short: it claims 16 frames, and 3 are there whole",
        18: "no such file",
        20: "it has a header but no samples",
        22: "cut short: its last part (mdat) lacks 617 bytes, and the index (moov) behind it",
        23: "the file is empty (0 bytes)",
    }


# --- tables as programs write them -----------------------------------------------------------------------------------


HEADER = b"id,domain,split,label,label_name,video\n"
LINES = [b"c0,a,train,0,one,v0.mp4", b"c1,a,test,0,one,v1.mp4", b"c2,a,train,1,two,v2.mp4"]


def parsed(tmp_path: Path, text: bytes):
    (tmp_path / "manifest.csv").write_bytes(text)
    return read(DatasetSettings(root=tmp_path), {})


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_line_ends(tmp_path, end):
    got = parsed(tmp_path, end.join([HEADER.strip(), *LINES, b""]))
    assert [clip.id for clip in got.clips] == ["c0", "c1", "c2"]


def test_lines_of_empty_cells_are_blank_lines(tmp_path):
    got = parsed(tmp_path, HEADER + b"\n".join([LINES[0], b",,,,,", LINES[1], b" , ,,,, ", LINES[2], b",,,,,", b""]))
    assert [clip.id for clip in got.clips] == ["c0", "c1", "c2"]


def test_a_quoted_cell_may_hold_line_ends(tmp_path):
    row = b'c9,a,train,0,"one\r\nof ""many""",v9.mp4'
    got = parsed(tmp_path, HEADER + b"\n".join([row, LINES[1].replace(b"one", b'"one of ""many"""'), LINES[2]]))
    assert got.clips[0].label_name == 'one of "many"'
    # Lines go on being counted in the file; a quote that is left open spoils its own line only.
    bad = HEADER + b"\n".join([row, b'c1,a,train,x,"one,v1.mp4', LINES[2], b"c3,a,train,9x,two,v.mp4", b""])
    message = problems(tmp_path, text=bad)
    assert bad_lines(message) == [4, 6]
    assert "line 4: a quote is not closed" in message


def test_one_name_in_two_spellings_of_unicode_is_one_domain(tmp_path):
    composed, split_up = "caf\u00e9", "cafe\u0301"
    rows = [row(0, domain=composed), row(1, domain=split_up), row(2, domain="b"), row(3, domain="b")]
    assert listing(tmp_path, rows).domains == (composed, "b")
    assert listing(tmp_path, rows, domains=(split_up,)).domains == (composed,)
    again = problems(tmp_path, [row(0, id=composed), row(1, id=split_up)])
    assert "is already on line 2" in again


# --- files decide before names ---------------------------------------------------------------------------------------


KINDS = {
    "video_feat": ("{}.npy", "array"),
    "audio_emb": ("{}.NPY", "array"),
    "rgb": ("{}.wav", "audio"),
    "features": ("{}.mp4", "video"),
    "left": ("{}.mkv", "video"),
    "voice": ("{}.flac", "audio"),
    "video": ("clips/{}", "video"),
    "flow": ("{}_flow_x.mp4", "flow"),
    "audio": ("{}.mp4", "audio"),
}


def bare(number: int) -> dict[str, object]:
    """A row that names no media yet."""
    return {key: value for key, value in row(number).items() if key not in ("video", "audio")}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("by_name", [False, True])
def test_what_a_columns_files_are_decides_its_kind(tmp_path, name, by_name):
    pattern, kind = KINDS[name]
    rows = [bare(n) | {name: pattern.format(n)} for n in range(4)]
    asked = {name: default_modality(name)} if by_name else None
    assert listing(tmp_path, rows, modalities=asked).modalities[name].kind == kind


def test_flow_arrays_are_told_from_features_by_their_shape(tmp_path):
    rows = [bare(n) | {"flow": f"{n}.npy"} for n in range(4)]
    assert listing(tmp_path, rows).modalities["flow"].kind == "flow"  # nothing is there yet: as the name says
    np.save(tmp_path / "1.npy", np.zeros((3, 8, 8, 2), np.float32))
    assert listing(tmp_path, rows).modalities["flow"].kind == "flow"
    np.save(tmp_path / "0.npy", np.zeros(8, np.float32))
    assert listing(tmp_path, rows).modalities["flow"].kind == "array"


# --- frames per second -----------------------------------------------------------------------------------------------


def test_spans_in_seconds_of_folders_take_their_rate_from_the_table(tmp_path):
    for n in range(4):
        write_frames(tmp_path / f"clips/{n}", numbered_frames(20))
    rows = [row(n, video=f"clips/{n}") | {"start": 0.5, "stop": 1.0, "fps": "10"} for n in range(4)]
    got = listing(tmp_path, rows)
    media = got.clips[0].media["video"]
    assert (media.rate, media.unit, media.start, media.stop) == (10.0, "s", 0.5, 1.0)
    frames = read_frames(media, np.arange, dataset=DatasetSettings())
    assert frame_numbers(frames) == [5, 6, 7, 8, 9]
    rows = [row(n, video=f"clips/{n}") | {"fps": value} for n, value in enumerate(("0", "-3", "fast", "nan"))]
    message = problems(tmp_path, rows)
    assert bad_lines(message) == [2, 3, 4, 5]
    assert "fps 'fast' is not a number of frames per second" in message


def test_files_keep_their_own_times(tmp_path):
    message = problems(tmp_path, [row(0) | {"fps": "25"}, row(1) | {"fps": ""}])
    assert bad_lines(message) == [2]
    assert "names no folder of frames: files have their own times" in message
