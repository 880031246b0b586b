"""Every format that is read, with structured damage under a right checksum: read, or one message; never a surprise."""

from __future__ import annotations

import contextlib
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import distort
import helpers
import numpy as np
import pytest
import torch
from commands import CUTS, DRAWS, LONGEST, SECONDS, settings_for, within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_epic_kitchens import needs_tables, write_tables
from test_hac import write_splits
from test_integrity import dataset_of, everything
from test_sound import encode
from test_sound import noise as samples
from test_tables import SPLITS
from test_whole import sound, video

from mbcd_cli import checksums
from mbcd_cli.cli.list import choices
from mbcd_cli.cli.train import show_training
from mbcd_cli.data.media.arrays import read_array, stored_shape
from mbcd_cli.data.media.sound import read_audio, stored_rate
from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.readers import read_dataset
from mbcd_cli.data.readers.new_clips import read_new
from mbcd_cli.data.readers.pickled_tables import read_pickled_frame
from mbcd_cli.data.records import Media
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.pretrained import load_pretrained
from mbcd_cli.errors import MbcdError, MediaError
from mbcd_cli.evaluation.report.comparison import compare_runs
from mbcd_cli.files import open_hdf5, read_json, read_records, write_json
from mbcd_cli.landscape.measure import redraw
from mbcd_cli.preparation.cache_plan import read_listing
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.preparation.repair import repair
from mbcd_cli.resolved import load_settings, resolve
from mbcd_cli.runs.opening import open_checkpoints, open_for_training
from mbcd_cli.scoring.deployed import build_models
from mbcd_cli.scoring.history import accuracy_history
from mbcd_cli.settings import DatasetSettings
from mbcd_cli.sweep.state import progress
from mbcd_cli.training.assemble import assemble
from mbcd_cli.training.curves import plot_run
from mbcd_cli.training.train import train

CPU = torch.device("cpu")


# --- what a file is read for ---------------------------------------------------------------------------------------


def rows(home: Path) -> None:
    """All rows and stored weights, and a batch whose labels and domains lead into their tables."""
    data = dataset_of(home)
    everything(data)
    for batch in data.batches(data.select(domains=data.domains), batch_size=4, training=False):
        assert (batch.labels < data.classes).all()
        assert (batch.domains < len(data.domains)).all()


def settings_of(home: Path, *more: str):
    sets = [*helpers.SMALL, *CUTS, "training.batch_size=4", "training.epochs=2", *more]
    flags = {"cache.dir": home / "cache", "dataset.name": "tiny", "training.target_domain": "gamma"}
    return resolve(sets=sets, flags=flags)


def tails(home: Path) -> None:
    assemble(*open_for_training(settings_of(home)), device=CPU)


def resumed(home: Path) -> None:
    """What is done is told; what is not goes on, and ends."""
    chosen, data = open_for_training(settings_of(home))
    show_training(train(chosen, data, run=home / "run", resume=True, overwrite=False))


def resumed_undone(home: Path) -> None:
    (home / "run/done").unlink()
    resumed(home)


def models(home: Path) -> None:
    best = home / "run/checkpoints/best.pt"
    chosen, data, found = open_checkpoints({"best": best}, config=None, sets=(), flags={"cache.dir": home / "cache"})
    build_models(chosen, data, found["best"], device=CPU)


def compared(home: Path) -> None:
    compare_runs([str(home / "run")], output=home / "comparison")


def curves(home: Path) -> None:
    progress(home / "run")
    accuracy_history(read_records(home / "run/metrics.jsonl"))
    with warnings.catch_warnings():  # a plot that cannot be drawn costs itself alone
        warnings.simplefilter("ignore")
        plot_run(home / "run")


def repaired(home: Path) -> None:
    shard = next((home / "cache/tiny").glob("audio-*/shard-00000.h5"))
    shard.write_bytes(b"torn")
    repair(home / "cache")


def listed(home: Path) -> None:
    found = read_listing(settings_for(home / "tiny", home / "cache"))
    assert all(0 <= clip.label < len(found.label_names) for clip in found.clips)
    assert all(clip.domain in found.domains for clip in found.clips)


def new(home: Path) -> None:
    dataset = DatasetSettings(reader="manifest", root=home / "tiny")
    found = read_new(dataset, dataset_of(home).modalities, label_names=("class0", "class1"))
    assert all(-1 <= clip.label < 2 for clip in found.clips)


@dataclass(frozen=True, slots=True)
class Case:
    """Files (a pattern under the home), how they are damaged, and what they are read for."""

    files: str
    damage: Callable[[distort.Draw, Path], None]
    uses: tuple[Callable[[Path], object], ...]


def again(home: Path) -> None:
    prepare(settings_for(home / "tiny", home / "cache"))


CASES = {
    "index": Case(
        "cache/tiny/*/index.h5", distort.hdf5_file, (rows, again, lambda h: choices("datasets", h / "cache"))
    ),
    "shard": Case("cache/tiny/*/shard-*.h5", distort.of_cache(distort.hdf5_file), (rows, again)),
    "stored weights": Case("cache/tiny/video-*/tail.pt", distort.of_cache(distort.torch_file), (rows, tails)),
    "settings of a cache": Case("cache/tiny/audio-*/prepare.toml", distort.toml_file, (repaired,)),
    "checkpoint": Case("run/checkpoints/best.pt", distort.torch_file, (models,)),
    "checkpoint to go on from": Case("run/checkpoints/last.pt", distort.torch_file, (resumed_undone,)),
    "end of a run": Case("run/done", distort.json_file, (resumed,)),
    "settings of a run": Case("run/settings.toml", distort.toml_file, (models, resumed)),
    "text of settings": Case(
        "run/settings.toml", distort.text_file, (lambda h: load_settings(h / "run/settings.toml"),)
    ),
    "config": Case("run/settings.toml", distort.toml_file, (lambda h: resolve(config=h / "run/settings.toml"),)),
    "results": Case("run/results.json", distort.json_file, (compared,)),
    "logs": Case("run/*s.jsonl", distort.text_file, (curves,)),
    "logs to go on from": Case("run/*.jsonl", distort.text_file, (resumed_undone,)),
    "landscape": Case("landscape/surface-best.h5", distort.hdf5_file, (lambda h: redraw(h / "landscape"),)),
    "manifest": Case("tiny/manifest.csv", distort.text_file, (listed, new)),
}


def without_surprise(read: Callable[[], object], what: object) -> MbcdError | None:
    """It works, or is one message of ours, in time."""
    told = None
    with within(SECONDS, what):
        try:
            read()
        except MbcdError as error:
            told = error
    if told is not None:
        assert told.message
        assert len(str(told)) < LONGEST
    return told


FEW = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=max(DRAWS // len(CASES), 10), deadline=None, suppress_health_check=list(HealthCheck))
stress = [pytest.mark.stress, pytest.mark.timeout(0)]


@pytest.mark.parametrize("effort", [FEW, pytest.param(MANY, marks=stress)], ids=["few", "many"])
@pytest.mark.parametrize("case", list(CASES))
def test_our_own_files(home, kept, case, effort, capsys):
    found = CASES[case]

    @effort
    @given(data=st.data())
    def tried(data):
        try:
            path = data.draw(st.sampled_from(sorted(home.glob(found.files))))
            found.damage(data.draw, path)
            use = data.draw(st.sampled_from(found.uses))
            without_surprise(partial(use, home), path)
        finally:
            for snapshot in kept.values():
                snapshot.restore()
            shutil.rmtree(home / "comparison", ignore_errors=True)

    tried()


@pytest.mark.parametrize("recipe", ["[]", "{}", '{"modality": []}'])
def test_an_index_without_the_name_of_its_modality(home, kept, recipe):
    for index in home.glob("cache/tiny/audio-*/index.h5"):
        with open_hdf5(index, "r+") as file:
            file.attrs["recipe"] = recipe
        checksums.stamp(index)
    for use in CASES["index"].uses:
        without_surprise(partial(use, home), recipe)


@pytest.mark.parametrize("made", [lambda views: ["x"] * len(views), lambda views: views[:, None]])
def test_what_is_no_list_of_views(home, kept, made):
    for shard in home.glob("cache/tiny/audio-*/shard-00000.h5"):
        with open_hdf5(shard, "r+") as file:
            views = file["test/view"][()]
            del file["test/view"]
            file["test/view"] = made(views)
        checksums.stamp(shard)
    assert "cannot be read" in without_surprise(partial(again, home), "shard").message


def test_a_format_of_a_thousand_letters(home, kept):
    for index in home.glob("cache/tiny/audio-*/index.h5"):
        with open_hdf5(index, "r+") as file:
            file.attrs["format"] = file.attrs["mbcd_version"] = "[" * 60_000
        checksums.stamp(index)
    assert "prepared by another version" in without_surprise(partial(rows, home), "index").message


def test_results_without_a_head(home, kept):
    results = home / "run/results.json"
    value = read_json(results)
    del value["headline"]["top1"]["audio"]
    write_json(results, value)
    assert "is no evaluation of ours" in without_surprise(partial(compared, home), "results").message


@pytest.mark.parametrize(("key", "value"), [("step", 2**63), ("step", 10**6), ("epoch", 2**63), ("epoch_step", 2**40)])
def test_more_steps_than_epochs_have(home, kept, key, value):
    last = home / "run/checkpoints/last.pt"
    payload = torch.load(last, weights_only=True)
    torch.save({**payload, key: value, **({"step": value} if key == "epoch_step" else {})}, last)
    checksums.stamp(last)
    assert "do not belong together" in without_surprise(partial(resumed_undone, home), key).message


def test_a_method_of_many_letters():
    told = without_surprise(lambda: resolve(sets=[f"method.name={'x' * 200_000}"]), "settings")
    assert told.message.startswith("There is no method 'xxx")


def test_logs_nested_too_deep(home, kept):
    log = home / "run/metrics.jsonl"
    log.write_bytes(distort.DEEP.encode() + b"\n" + log.read_bytes())
    assert "line 1: not JSON" in without_surprise(partial(curves, home), "logs").message


# --- files of others -----------------------------------------------------------------------------------------------


def every(count: int) -> np.ndarray:
    return np.arange(count)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A small file of every container, kind of sound, image and array."""
    folder = tmp_path_factory.mktemp("media")
    for suffix in (".mp4", ".mov", ".flv", ".ts", ".mkv", ".wmv", ".ogv", ".avi", ".mpg", ".nut"):
        video(folder / f"picture{suffix}", 24)
    for suffix in ("wav", "flac", "aiff", "au", "caf", "w64"):
        sound(folder / f"sound.{suffix}", seconds=0.5)
    for name, codec in (("a.ogg", "vorbis"), ("b.opus", "libopus"), ("c.mp3", "libmp3lame"), ("d.m4a", "aac")):
        rate = 48000 if codec == "libopus" else 16000
        encode(folder / name, samples(0.5, rate), codec, rate=rate)
    encode(folder / "both.mp4", samples(1.0), "aac", picture=0.0)
    encode(folder / "both.webm", samples(1.0, 48000), "libopus", rate=48000)
    helpers.write_frames(folder / "frames", helpers.numbered_frames(3))
    helpers.write_frames(folder / "images", helpers.numbered_frames(3), suffix="png")
    helpers.write_array(folder / "vector.npy", np.arange(6, dtype=np.float32))
    helpers.write_array(folder / "steps.npy", np.arange(12).reshape(2, 6))
    return folder


def heard(clip: Media, dataset: DatasetSettings) -> None:
    stored_rate(clip.path)
    found, rate = read_audio(clip, dataset=dataset, sample_rate=8000)
    assert rate == 8000
    assert found.ndim == 1
    assert len(found)
    assert np.isfinite(found).all()


def seen(clip: Media, dataset: DatasetSettings) -> None:
    found = read_frames(clip, every, dataset=dataset)
    assert found.dtype == np.uint8
    assert found.ndim == 4
    assert found.size


def taken(clip: Media, dataset: DatasetSettings) -> None:
    stored_shape(clip.path)
    found = read_array(clip)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


SPANS = [{}, {"start": 0.1, "stop": 0.4}, {"start": 2, "stop": 6, "unit": "frame"}]


@pytest.mark.parametrize(
    "effort",
    [settings(FEW, max_examples=150), pytest.param(settings(MANY, max_examples=DRAWS), marks=stress)],
    ids=["few", "many"],
)
def test_media(media, tmp_path, effort):
    """Frames, sound, arrays: what is asked for, or a cause with a remedy."""

    @effort
    @given(data=st.data())
    def tried(data):
        draw = data.draw
        source = draw(st.sampled_from(sorted(media.iterdir())))
        path = tmp_path / source.name
        array = source.suffix == ".npy"
        try:
            (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
            victim = sorted(path.iterdir())[1] if path.is_dir() else path
            for _ in range(draw(st.integers(1, 2))):
                with contextlib.suppress(ValueError, IndexError, struct.error):  # the first damage left no header
                    (distort.npy_file if array else distort.media_file)(draw, victim)
            dataset = DatasetSettings(min_frames=1, missing_frames=draw(st.sampled_from(["reject", "nearest"])))
            clip = Media(path, **draw(st.sampled_from(SPANS)))
            for read in (taken,) if array else (seen, heard):
                told = without_surprise(partial(read, clip, dataset), source.name)
                assert told is None or (isinstance(told, MediaError) and told.cause and told.remedy)
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    tried()


@pytest.mark.parametrize(
    "effort",
    [settings(FEW, max_examples=60), pytest.param(settings(MANY, max_examples=min(DRAWS, 3000)), marks=stress)],
    ids=["few", "many"],
)
@pytest.mark.parametrize("reader", ["epic-kitchens", "hac", pytest.param("pickle", marks=needs_tables)])
def test_split_tables(tmp_path, reader, effort):
    """Lines of CSV tables, opcodes of pickled ones."""
    folder = {"epic-kitchens": write_tables, "hac": write_splits, "pickle": write_pickles}[reader](tmp_path / "tables")
    whole = {path: path.read_bytes() for path in sorted(folder.iterdir())}

    @effort
    @given(data=st.data())
    def tried(data):
        path = data.draw(st.sampled_from(list(whole)))
        try:
            if reader == "pickle":
                distort.pickle_file(data.draw, path)
                without_surprise(partial(read_pickled_frame, path), path)
            else:
                distort.text_file(data.draw, path)
                without_surprise(partial(read_dataset, DatasetSettings(reader=reader, root=folder), {}), path)
        finally:
            for name, content in whole.items():
                name.write_bytes(content)

    tried()


def write_pickles(folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(SPLITS / "D1_test.pkl", folder)
    return folder


@pytest.mark.parametrize(
    "effort", [FEW, pytest.param(settings(MANY, max_examples=min(DRAWS, 1000)), marks=stress)], ids=["few", "many"]
)
def test_published_weights(home, tmp_path, effort):
    modality = dataset_of(home).modalities["audio"]
    encoder = build_encoder("audio", modality)
    file = tmp_path / "weights.pth"

    @effort
    @given(data=st.data())
    def tried(data):
        torch.save({"state_dict": encoder.stages.state_dict(), "epoch": 3}, file)
        distort.torch_file(data.draw, file)
        without_surprise(partial(load_pretrained, encoder, modality.encoder, file), file)

    tried()
