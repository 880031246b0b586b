"""The HAC reader on a miniature, on the real tables, and the span of its sound."""

from __future__ import annotations

import csv
import tomllib
from pathlib import Path

import numpy as np
import pytest
from helpers import numbered_frames, tone, write_video, write_wav
from typer.testing import CliRunner

from mbcd_cli.cli import app
from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.data.modalities.audio import AudioModality, followed_spans
from mbcd_cli.data.modalities.flow import FlowModality
from mbcd_cli.data.modalities.frames import FrameSampling
from mbcd_cli.data.modalities.modality import load_views, view_generator
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.readers import read_dataset
from mbcd_cli.data.readers.new_clips import read_new
from mbcd_cli.data.readers.places import SplitSettings
from mbcd_cli.data.readers.presence import check_media
from mbcd_cli.data.records import TEST_VIEW, Media
from mbcd_cli.errors import ManifestError, MediaError
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve, validate
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.settings import DatasetSettings
from mbcd_cli.sweep import run as running

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "hac-splits"
DOMAINS = ("human", "animal", "cartoon")


def files(domain: str, split: str) -> list[tuple[str, int]]:
    # Names as in the real tables: a leading dash, a dot, a space before the suffix.
    odd = {"human": "-Gc65Qj4Gzg-001.mp4", "animal": "a.b_000001_000011.mp4", "cartoon": "drinking_54 .mp4"}
    return [(odd[domain] if split == "train" else f"{domain}_1.mp4", 3), (f"{split}_2.mp4", 6)]


def write_splits(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for split in ("train", "test"):
            text = "".join(f"{name},{label}\r\n" for name, label in files(domain, split))
            (folder / f"HAC_{split}_only_{domain}.csv").write_bytes(text.encode())
    return folder


def write_media(root: Path, *, flow: bool = True, frames: int = 20) -> Path:
    for domain in DOMAINS:
        for split in ("train", "test"):
            for name, _ in files(domain, split):
                stem = name[:-4]
                write_video(root / domain / "videos" / name, numbered_frames(frames), fps=24)
                for direction in "xy" if flow else "":
                    write_video(root / domain / "flow" / f"{stem}_flow_{direction}.mp4", numbered_frames(frames - 1))
                write_wav(root / domain / "audio" / f"{stem}.wav", tone(frames / 24), rate=8000)
    return root


def settings(root: Path, **changes) -> DatasetSettings:
    return DatasetSettings(**{"reader": "hac", "root": root, **changes})


@pytest.mark.parametrize("layout", ["beside", "HAC", "inside the splits", "splits as root"])
def test_layouts(tmp_path, layout):
    splits = write_splits(tmp_path / "HAC_Splits")
    base = {"HAC": tmp_path / "HAC", "inside the splits": splits}.get(layout, tmp_path)
    write_media(base)
    root = splits if layout == "splits as root" else tmp_path
    listing = read_dataset(settings(root), {})
    assert listing.name == "hac"
    assert listing.domains == DOMAINS
    assert list(listing.modalities) == ["video", "audio", "flow"]
    assert len(listing.label_names) == 7
    assert len(listing.clips) == len({clip.id for clip in listing.clips}) == 12
    assert all(not p.files_missing for p in check_media(listing).values())
    clip = listing.clips[0]
    assert (clip.id, clip.domain, clip.split, clip.label_name) == (
        "human-train--Gc65Qj4Gzg-001",
        "human",
        "train",
        "drinking",
    )
    video = VideoModality(frames=4, interval=2, short_side=32, crop=32)
    (view,) = load_views(clip, "video", video, views=[TEST_VIEW], seed=0, dataset=settings(root))
    assert view[0].shape == (3, 4, 32, 32)
    flow = FlowModality(frames=4, interval=2, short_side=32, crop=32)
    (view,) = load_views(listing.clips[-2], "flow", flow, views=[TEST_VIEW], seed=0, dataset=settings(root))
    assert view[0].shape == (2, 4, 32, 32)


def test_what_is_missing_is_said(tmp_path):
    write_splits(tmp_path / "HAC_Splits")
    write_media(tmp_path, flow=False)
    (tmp_path / "animal" / "audio" / "test_2.wav").unlink()
    listing = read_dataset(settings(tmp_path), {})
    assert any(line.startswith("flow: there is none") for line in listing.warnings)
    assert any("audio: nothing is on disk for 1 of 12 clips" in line for line in listing.warnings)
    (gap,) = check_media(listing)["audio"].gaps
    assert gap.clip == "animal-test-test_2"
    assert gap.first.endswith("animal/audio/test_2.wav")
    computed = read_dataset(settings(tmp_path, compute_flow=True), {})
    assert computed.clips[0].media["flow"].computed
    assert computed.clips[0].media["flow"].path == computed.clips[0].media["video"].path


def test_one_file_with_two_labels_is_said(tmp_path):
    splits = write_splits(tmp_path / "HAC_Splits")
    write_media(tmp_path)
    for split, label in (("train", 1), ("test", 4)):
        with (splits / f"HAC_{split}_only_human.csv").open("a") as stream:
            stream.write(f"both.mp4,{label}\nsame.mp4,2\n,\n")
    warnings = read_dataset(settings(tmp_path), {}).warnings
    assert "human: 1 files have two labels, the first both.mp4 (in train and in test)" in warnings


def test_bad_rows_are_listed(tmp_path):
    splits = write_splits(tmp_path / "HAC_Splits")
    write_media(tmp_path)
    (splits / "HAC_train_only_human.csv").write_text("../x.mp4,0\nok.mp4,7\nlonely.mp4\nfine.mp4,1\nfine.mp4,1\n")
    (splits / "HAC_test_only_animal.csv").unlink()
    with pytest.raises(ManifestError) as caught:
        read_dataset(settings(tmp_path), {})
    message = str(caught.value)
    for part in (
        "HAC_train_only_human.csv, line 1: '../x.mp4' is no file name",
        "line 2: label '7' is not one of 0 to 6",
        "line 3: 1 cells",
        "HAC_test_only_animal.csv: cannot be read",
        "clip human-train-fine is there twice",
    ):
        assert part in message


@pytest.mark.skipif(not REAL.is_dir(), reason="the HAC split tables are not beside the clone")
def test_the_real_tables_in_full(tmp_path):
    for domain in DOMAINS:
        for kind in ("videos", "flow", "audio"):
            (tmp_path / domain / kind).mkdir(parents=True)
        for split in ("train", "test"):
            with (REAL / f"HAC_{split}_only_{domain}.csv").open(newline="") as stream:
                for name, _ in csv.reader(stream):
                    (tmp_path / domain / "videos" / name).write_bytes(b"x")
                    for direction in "xy":
                        (tmp_path / domain / "flow" / f"{name[:-4]}_flow_{direction}.mp4").write_bytes(b"x")
                    (tmp_path / domain / "audio" / f"{name[:-4]}.wav").write_bytes(b"x")
    listing = read_dataset(settings(tmp_path, reader=SplitSettings(name="hac", splits=REAL)), {})
    assert len(listing.clips) == 3381
    # The only thing unusual about the published tables: 24 human clips are in both splits.
    assert [line.split(" (")[0] for line in listing.warnings] == [
        "human: 24 files are both in the train and in the test split"
    ]
    assert {name: (p.complete, p.files_missing) for name, p in check_media(listing).items()} == dict.fromkeys(
        ("video", "audio", "flow"), (3381, 0)
    )


FOLLOWING = AudioModality(
    follow="video",
    followed=FrameSampling(frames=4, interval=3),
    samples=2048,
    short="repeat",
    nperseg=256,
    noverlap=128,
)


def test_sound_spans_the_frames_of_the_test_view(tmp_path):
    video = write_video(tmp_path / "x.mp4", numbered_frames(20), fps=24)
    media = Media(tmp_path / "x.wav", clock=video)
    (span,) = followed_spans(media, FOLLOWING, [None])
    # 20 frames, 4 at interval 3 span 10: from frame 5 to frame 14.
    assert (span.start, span.stop, span.unit) == (5 / 24, 14 / 24, "s")


def test_videos_of_another_rate_than_the_protocols_are_told(tmp_path):
    videos = [write_video(tmp_path / f"{fps}-{n}.mp4", numbered_frames(9), fps=fps) for fps in (24, 30) for n in (0, 1)]
    gone = tmp_path / "gone.mp4"
    media = [Media(tmp_path / "x.wav", clock=video) for video in (*videos, gone, tmp_path)]
    (told,) = FOLLOWING.warnings(media, name="audio")
    assert "2 of 4 videos show other than 24 frames per second (most often 30)" in told
    assert FOLLOWING.warnings(media[:2], name="audio") == []
    assert AudioModality().warnings(media, name="audio") == []


def test_short_clips_are_heard_whole_when_sampling_wraps_around(tmp_path):
    video = write_video(tmp_path / "x.mp4", numbered_frames(9), fps=24)  # frames 0, 3, 6, 0
    (span,) = followed_spans(Media(tmp_path / "x.wav", clock=video), FOLLOWING, [None])
    assert (span.start, span.stop) == (None, None)


def test_training_views_hear_what_they_see(tmp_path):
    """Every training view's sound begins with the first frame that the same view of the video shows."""
    write_splits(tmp_path / "HAC_Splits")
    write_media(tmp_path)
    listing = read_dataset(settings(tmp_path), {})
    clip = listing.clips[0]
    looking = VideoModality(frames=4, interval=3, short_side=48, crop=48, crop_area=(1, 1), crop_aspect=(1, 1), flip=0)
    views = list(range(6))
    seen = load_views(clip, "video", looking, views=views, seed=7, dataset=settings(tmp_path))
    guides = [view_generator(7, clip.id, "video", view) for view in views]
    spans = followed_spans(clip.media["audio"], FOLLOWING, guides)
    first = [round(float(part[0, 0, -8:, -8:].mean()) / 10) for (part,) in seen]
    assert [round(span.start * 24) for span in spans] == first
    assert len(set(first)) > 2
    heard = load_views(clip, "audio", FOLLOWING, views=[TEST_VIEW, *views], seed=7, dataset=settings(tmp_path))
    assert len(heard) == 7
    assert all(np.isfinite(part).all() for (part,) in heard)


def test_sound_may_follow_the_flow(tmp_path):
    """Where there is no video the protocol cuts the sound by the flow's frames: 19 of them, 4 at interval 3."""
    write_splits(tmp_path / "HAC_Splits")
    write_media(tmp_path)
    sound = FOLLOWING.model_copy(update={"follow": "flow"})
    listing = read_dataset(settings(tmp_path), {"audio": sound, "flow": FlowModality()})
    media = listing.clips[0].media["audio"]
    assert media.clock == listing.clips[0].media["flow"].path
    (span,) = followed_spans(media, sound, [None])
    assert (span.start, span.stop) == (4 / 24, 13 / 24)
    listing = read_dataset(settings(tmp_path), {"audio": FOLLOWING, "flow": FlowModality()})
    assert listing.clips[0].media["audio"].clock.parent.name == "videos"


def test_sound_that_ends_before_the_frames_begin_is_silence(tmp_path):
    """In the reference's loader too; other clips' spans after the end are errors (test_media.py)."""
    write_splits(tmp_path / "HAC_Splits")
    write_media(tmp_path)
    clip = read_dataset(settings(tmp_path), {}).clips[0]
    write_wav(clip.media["audio"].path, tone(0.1), rate=8000)  # the frames of the test view begin at 5 / 24 s
    notes: list[str] = []
    ((silent,), (begun,)) = load_views(
        clip, "audio", FOLLOWING, views=[TEST_VIEW, 0], seed=0, dataset=settings(tmp_path), notes=notes
    )
    assert not silent.any()
    assert np.isfinite(begun).all()
    assert "after the end of the sound (0.10 s); mended with silence" in notes[0]
    whole = settings(tmp_path, missing_frames="reject")
    with pytest.raises(MediaError, match="after the end of the sound"):
        load_views(clip, "audio", FOLLOWING, views=[TEST_VIEW], seed=0, dataset=whole)


def test_sound_may_follow_a_computed_flow(tmp_path):
    """Flow lies between frames: there is one less of it."""
    write_splits(tmp_path / "HAC_Splits")
    write_media(tmp_path, flow=False)
    sound = FOLLOWING.model_copy(update={"follow": "flow"})
    wanted = {"audio": sound, "flow": FlowModality()}
    (spans, *_) = [
        followed_spans(clip.media["audio"], sound, [None])
        for clip in read_dataset(settings(tmp_path, compute_flow=True), wanted).clips
    ]
    assert [(span.start, span.stop) for span in spans] == [(4 / 24, 13 / 24)]  # of 19, as with flow files


def test_new_clips_and_manifests_hear_what_they_see_too(tmp_path):
    write_splits(tmp_path / "HAC_Splits")
    write_media(tmp_path)
    clip = read_dataset(settings(tmp_path), {}).clips[0]
    table = tmp_path / "manifest.csv"
    video, sound = (clip.media[name].path.relative_to(tmp_path) for name in ("video", "audio"))
    (expected,) = load_views(clip, "audio", FOLLOWING, views=[TEST_VIEW], seed=0, dataset=settings(tmp_path))
    wanted = {"video": VideoModality(), "audio": FOLLOWING}
    plain = DatasetSettings(root=tmp_path)
    table.write_text(f"video,audio\n{video},{sound}\n")
    (new,) = read_new(plain, wanted, label_names=["a"]).clips
    table.write_text(f"id,domain,split,label,video,audio\nx,a,train,0,{video},{sound}\n")
    (listed,) = read_dataset(plain, wanted).clips
    table.write_text(f"id,domain,split,label,video,audio,start,stop\nx,a,train,0,{video},{sound},0.1,0.6\n")
    (spanned,) = read_dataset(plain, wanted).clips
    for found in (new, listed):
        (heard,) = load_views(found, "audio", FOLLOWING, views=[TEST_VIEW], seed=0, dataset=plain)
        assert np.array_equal(heard[0], expected[0])
    assert spanned.media["audio"].clock is None  # its span is given


def test_sound_follows_what_is_read():
    def sound(*names: str, preset="hac"):
        return resolve(preset=preset, flags={"model.modalities": names or None}).modalities["audio"]

    def follows(one):
        return one.follow, one.followed.frames, one.followed.interval

    assert follows(sound("audio", "flow")) == ("flow", 8, 4)
    for names in ((), ("video", "audio"), ("video", "audio", "flow"), ("audio",), ("video", "flow")):
        assert follows(sound(*names)) == ("video", 32, 2), names
    assert sound("audio", "flow", preset="epic-kitchens").follow is None
    for names in ((), ("audio", "flow")):
        off = resolve(preset="hac", sets=["modalities.audio.follow="], flags={"model.modalities": names or None})
        assert off.modalities["audio"].follow is None
    spread = resolve(preset="hac", sets=["modalities.flow.interval=0"], flags={"model.modalities": ("audio", "flow")})
    spread = type(spread).model_validate(spread.model_dump())
    assert follows(spread.modalities["audio"]) == ("flow", 8, 0)


SMALL_SWEEP = """
[dataset]
reader = "hac"
name = "hac"
classes = 7
target_split = "all"
max_bad = 0

[modalities.video]
kind = "video"
frames = 4
short_side = 32
crop = 32

[modalities.audio]
kind = "audio"
follow = "video"
samples = 2048
nperseg = 256
noverlap = 128

[modalities.flow]
kind = "flow"
frames = 3
interval = 2
short_side = 32
crop = 32

[cache]
views = 1
workers = 0
"""


def test_a_sweep_prepares_the_sound_of_every_set_of_modalities(tmp_path, monkeypatch):
    write_splits(tmp_path / "data/HAC_Splits")
    root = write_media(tmp_path / "data")
    (tmp_path / "small.toml").write_text(SMALL_SWEEP)
    seen = []

    monkeypatch.setattr(running, "launch", lambda board, *_, **__: seen.extend(board.waiting.values()))
    words = ["sweep", "--config", tmp_path / "small.toml", "--modality-sets", "va,af", "--methods", "erm"]
    words += ["--seeds", 1, "--targets", "cartoon", "--runs-dir", tmp_path / "runs", "--cache-dir", tmp_path / "cache"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 1  # nothing is prepared, and no root is named
    done = CliRunner().invoke(app, [*map(str, words), "--root", str(root)])
    assert len(seen) == 2, done.output
    recipes = {}
    for cell in seen:
        cache = open_for_training(cell.settings)[1].caches["audio"]
        recipes[cell.settings.model.modalities] = (
            cache.recipe["view"]["follow"],
            cache.recipe["view"]["followed"]["frames"],
        )
    assert recipes == {("video", "audio"): ("video", 4), ("audio", "flow"): ("flow", 3)}
    assert len(list((tmp_path / "cache/hac").glob("audio-*"))) == 2
    assert len(list((tmp_path / "cache/hac").glob("flow-*"))) == 1
    # Prepared for all three at once, flow with sound alone is another matter, and the message says how.
    (tmp_path / "cache/hac").rename(tmp_path / "gone")
    done = CliRunner().invoke(app, [*map(str, words), "--root", str(root), "--modality-sets", "va"])
    done = CliRunner().invoke(app, [*map(str, words), "--modality-sets", "af"])
    text = " ".join(done.output.split())
    assert "follow: cache has video, settings say flow" in text
    assert "--modalities audio,flow" in text


def test_too_many_rejected_clips_stop_a_sweep_before_it_trains(tmp_path):
    write_splits(tmp_path / "data/HAC_Splits")
    root = write_media(tmp_path / "data", flow=False)
    next(root.glob("human/videos/*.mp4")).write_bytes(b"no video")
    (tmp_path / "small.toml").write_text(SMALL_SWEEP)
    words = ["sweep", "--config", tmp_path / "small.toml", "--modality-sets", "va", "--root", root]
    words += ["--runs-dir", tmp_path / "runs", "--cache-dir", tmp_path / "cache"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 1
    assert "More clips were rejected than dataset.max_bad = 0 allows" in " ".join(done.output.split())
    assert not (tmp_path / "runs").exists()


def test_stored_sound_is_drawn_with_the_frames_it_follows(tmp_path):
    """In training the sound's view is the video's; without `follow` the two are drawn apart."""
    write_splits(tmp_path / "HAC_Splits")
    write_media(tmp_path, flow=False)
    small = ["modalities.video.frames=4", "modalities.video.short_side=32", "modalities.video.crop=32"]
    small += ["modalities.audio.samples=2048", "modalities.audio.nperseg=256", "modalities.audio.noverlap=128"]
    small += ["cache.views=4", "cache.workers=0", "model.modalities=video,audio"]
    for follow in (True, False):
        tree = resolve(
            sets=[*small, *(["modalities.audio.follow=video"] if follow else [])],
            flags={"dataset.reader": "hac", "dataset.root": tmp_path, "cache.dir": tmp_path / str(follow)},
        )
        prepare(tree)
        dataset = open_dataset(tree, name="hac", modalities=["video", "audio"])
        clips = dataset.select(domains=list(DOMAINS), splits=["train"])
        drawn: dict[str, list[int]] = {"video": [], "audio": []}

        def read(name, index, chosen, drawn=drawn, dataset=dataset):
            drawn[name] += chosen.tolist()
            return dataset.caches[name].read(index, chosen)

        for epoch in range(4):
            for _ in dataset.batches(clips, batch_size=2, training=True, epoch=epoch, read=read):
                pass
        assert (drawn["video"] == drawn["audio"]) is follow
        assert len(set(drawn["video"])) > 1


def test_preset_holds_the_papers_values():
    presets = Path(__file__).resolve().parents[2] / "presets"
    hac, epic = (validate(tomllib.loads((presets / f"{n}.toml").read_text())) for n in ("hac", "epic-kitchens"))
    assert (hac.dataset.reader.name, hac.dataset.classes, hac.dataset.target_split) == ("hac", 7, "all")
    assert hac.modalities["video"] == epic.modalities["video"]
    assert hac.modalities["flow"] == epic.modalities["flow"]
    sound = hac.modalities["audio"]
    assert (sound.follow, sound.follow_rate) == ("video", 24.0)
    assert hac.training == epic.training
