"""The cache: what is read is what was decoded, whatever killed, resumed or parallel way it was written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import helpers
import numpy as np
import pytest
import torch

from mbcd_cli import checksums
from mbcd_cli.data import cache as cache_room
from mbcd_cli.data.cache import shard_ranges, views_of
from mbcd_cli.data.clips import Clips
from mbcd_cli.data.dataset import ModalityCache, open_dataset
from mbcd_cli.data.modalities.modality import load_views
from mbcd_cli.data.prepared import prepared_datasets
from mbcd_cli.data.records import TEST_VIEW, Clip
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.staged import Trunk
from mbcd_cli.errors import CacheError, CheckpointError, FileError
from mbcd_cli.integrity import examine
from mbcd_cli.preparation.cache_plan import read_listing
from mbcd_cli.preparation.check import check
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.preparation.trunk import weights_bytes
from mbcd_cli.resolved import resolve


def settings_for(root: Path, cache: Path, *sets: str):
    return resolve(sets=[*helpers.SMALL, *sets], flags={"dataset.root": root, "cache.dir": cache})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return helpers.write_dataset(tmp_path_factory.mktemp("media") / "tiny")


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    settings = settings_for(root, tmp_path_factory.mktemp("cache"))
    return settings, prepare(settings)


def contents(folder: Path) -> dict[str, np.ndarray]:
    """Every dataset of every shard of a cache folder."""
    found = {}
    for path in sorted(folder.glob("shard-*.h5")):
        with h5py.File(path) as file:
            file.visititems(
                lambda name, item, path=path: (
                    found.__setitem__(f"{path.name}/{name}", item[()]) if isinstance(item, h5py.Dataset) else None
                )
            )
    return found


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_every_row_is_the_decoded_view(prepared):
    settings, result = prepared
    dataset = open_dataset(settings, name="tiny")
    listing = read_listing(settings)
    assert list(dataset.clips.ids) == [clip.id for clip in listing.clips]
    assert result.rejected == []
    for index, clip in enumerate(listing.clips):
        views = [TEST_VIEW] if clip.split == "test" else [0, 1]
        for name, modality in dataset.modalities.items():
            expected = load_views(clip, name, modality, views=views, seed=0, dataset=settings.dataset)
            for view, parts in zip(views, expected, strict=True):
                (read,) = dataset.caches[name].read(np.array([index]), np.array([view]))
                stored = parts[0].astype(np.float16) if parts[0].dtype == np.float32 else parts[0]
                assert np.array_equal(read[0].numpy(), stored)


def test_shards_are_plain_contiguous_hdf5_with_provenance(prepared):
    _, result = prepared
    folder = Path(result.modalities["video"].folder)
    with h5py.File(folder / "shard-00000.h5") as file:
        part = file["train/part0"]
        assert part.chunks is None
        assert part.dtype == np.uint8
        mapped = np.memmap(folder / "shard-00000.h5", part.dtype, "r", part.id.get_offset(), part.shape)
        assert np.array_equal(mapped, part[()])
    with h5py.File(folder / "index.h5") as file:
        for key in ("recipe", "reader", "root", "mbcd_version", "torch_version", "prepared_at"):
            assert file.attrs[key]


def test_second_run_reuses_everything_and_workers_change_nothing(root, prepared, tmp_path):
    settings, result = prepared
    again = prepare(settings)
    for name, done in again.modalities.items():
        assert done.shards_reused == done.shards > 1
        assert done.fingerprint == result.modalities[name].fingerprint
    other = prepare(settings_for(root, tmp_path, "cache.workers=2"))
    for name, done in other.modalities.items():
        assert same(contents(Path(done.folder)), contents(Path(result.modalities[name].folder)))


def test_compressed_shards_hold_the_same(root, prepared, tmp_path):
    settings, _ = prepared
    squeezed = settings_for(root, tmp_path, "cache.compression=gzip", "model.modalities=video")
    prepare(squeezed)
    clips, views = np.array([0, 1]), np.array([1, 0])
    (a,) = open_dataset(squeezed, name="tiny", modalities=["video"]).caches["video"].read(clips, views)
    (b,) = open_dataset(settings, name="tiny").caches["video"].read(clips, views)
    assert torch.equal(a, b)


def test_killed_prepare_resumes_to_the_same_cache(root, prepared, tmp_path):
    _, result = prepared
    command = [
        sys.executable,
        "-m",
        "mbcd_cli",
        "prepare",
        "manifest",
        "--root",
        str(root),
        "--cache-dir",
        str(tmp_path),
    ]
    for assignment in helpers.SMALL:
        command += ["--set", assignment]
    # One clip per shard, so that there are many moments to be killed at.
    command += ["--set", "cache.shard_clips=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    helpers.until(lambda: list(tmp_path.glob("tiny/*/shard-00001.h5")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("tiny/audio-*/index.h5"))
    leftover = next(tmp_path.glob("tiny/*/shard-*.h5")).with_name(".shard-00007.h5.host.1.partial")
    leftover.write_bytes(b"torn")
    done = prepare(settings_for(root, tmp_path, "cache.shard_clips=1"))
    assert done.modalities["video"].shards_reused >= 2
    assert not leftover.exists()
    for name, entry in done.modalities.items():
        whole = ModalityCache(Path(result.modalities[name].folder))
        resumed = ModalityCache(Path(entry.folder))
        for view in (TEST_VIEW, 0, 1):
            clips = np.flatnonzero(whole.stored(view))
            views = np.full(len(clips), view)
            assert torch.equal(resumed.read(clips, views)[0], whole.read(clips, views)[0])


def test_batches_are_reproducible_complete_and_resumable(prepared):
    settings, _ = prepared
    dataset = open_dataset(settings, name="tiny")
    clips = dataset.select(domains=["alpha", "beta"], splits=["train"])
    first = list(dataset.batches(clips, batch_size=3, training=True, seed=1, epoch=2))
    assert [len(batch) for batch in first] == [3, 3, 2]
    assert sorted(torch.cat([batch.clips for batch in first]).tolist()) == sorted(clips.tolist())
    resumed = list(dataset.batches(clips, batch_size=3, training=True, seed=1, epoch=2, start=1))
    for a, b in zip(first[1:], resumed, strict=True):
        assert torch.equal(a.clips, b.clips)
        assert all(torch.equal(a.inputs[name][0], b.inputs[name][0]) for name in a.inputs)
    other = torch.cat([b.clips for b in dataset.batches(clips, batch_size=3, training=True, seed=1, epoch=3)])
    assert not torch.equal(torch.cat([b.clips for b in first]), other)
    assert len(list(dataset.batches(clips, batch_size=3, training=True, drop_last=True))) == 2
    for batch in first:
        assert torch.equal(batch.labels, torch.from_numpy(dataset.clips.labels[batch.clips.numpy()]))


@pytest.mark.parametrize("stored", [1, 2, 3])
def test_two_views_of_a_clip_differ_and_the_first_is_that_of_one(root, tmp_path, stored):
    settings = settings_for(root, tmp_path, f"cache.views={stored}", "modalities.audio.follow=video")
    prepare(settings)
    dataset = open_dataset(settings, name="tiny")
    clips = dataset.select(domains=["alpha", "beta"], splits=["train"])
    asked: dict[str, list[np.ndarray]] = {}

    def read(name, index, views):
        asked.setdefault(name, []).append(views.reshape(-1, 2))
        return dataset.caches[name].read(index, views)

    seen = set()
    for epoch in range(12):
        options = {"batch_size": 4, "training": True, "seed": 1, "epoch": epoch, "drop_last": True}
        for one, two in zip(dataset.batches(clips, **options), dataset.batches(clips, views=2, **options), strict=True):
            assert torch.equal(two.clips, one.clips.repeat_interleave(2))
            assert torch.equal(two.labels, one.labels.repeat_interleave(2))
            assert torch.equal(two.domains, one.domains.repeat_interleave(2))
            for name in one.inputs:
                assert torch.equal(two.inputs[name][0][0::2], one.inputs[name][0])
        shares = [list(dataset.batches(clips, views=2, share=(rank, 2), read=read, **options)) for rank in range(2)]
        for parts, two in zip(zip(*shares, strict=True), dataset.batches(clips, views=2, **options), strict=True):
            assert torch.equal(torch.cat([part.clips for part in parts]), two.clips)
            for name in two.inputs:
                assert torch.equal(torch.cat([part.inputs[name][0] for part in parts]), two.inputs[name][0])
    for name, views in asked.items():
        pairs = np.concatenate(views)
        assert ((pairs[:, 0] != pairs[:, 1]) == (stored > 1)).all(), name
        seen |= set(map(tuple, pairs.tolist()))
    assert len(seen) == max(stored * (stored - 1), 1)
    assert all(np.array_equal(*pair) for pair in zip(asked["video"], asked["audio"], strict=True))


def test_select_limits_evenly_and_names_what_is_missing(prepared):
    settings, _ = prepared
    dataset = open_dataset(settings, name="tiny")
    everything = dataset.select(domains=["alpha", "beta"])
    limited = dataset.select(domains=["alpha", "beta"], limit=3)
    assert len(everything) == 12
    assert limited.tolist() == [everything[0], everything[6], everything[-1]]
    with pytest.raises(CacheError, match="no domain 'gamma'"):
        dataset.select(domains=["gamma"])


def test_a_cache_older_than_a_setting_has_its_default(root, tmp_path):
    settings = settings_for(root, tmp_path, "model.modalities=video")
    prepare(settings)
    (index,) = tmp_path.glob("tiny/video-*/index.h5")
    with h5py.File(index, "r+") as file:
        recipe = json.loads(file.attrs["recipe"])
        del recipe["view"]["sampling"]
        file.attrs["recipe"] = json.dumps(recipe)
    checksums.stamp(index)
    assert open_dataset(settings, name="tiny", modalities=["video"]).caches
    other = settings_for(root, tmp_path, "model.modalities=video", "modalities.video.sampling=reference")
    with pytest.raises(CacheError, match="sampling: cache has centred, settings say reference"):
        open_dataset(other, name="tiny", modalities=["video"])


def test_stale_cache_is_refused_and_says_what_changed(root, prepared):
    settings, _ = prepared
    changed = settings_for(root, settings.cache.dir, "modalities.video.crop=16")
    with pytest.raises(CacheError, match=r"crop: cache has 20, settings say 16"):
        open_dataset(changed, name="tiny")
    wider = settings_for(root, settings.cache.dir, "modalities.video.width=8")
    assert open_dataset(wider, name="tiny").modalities["video"].width == 8  # decoded frames serve any encoder


def test_missing_caches_say_what_there_is(root, prepared, tmp_path):
    settings, _ = prepared
    assert prepared_datasets(settings.cache.dir) == ["tiny"]
    with pytest.raises(CacheError, match="Prepared so far: tiny"):
        open_dataset(settings, name="other")
    with pytest.raises(CacheError, match="Nothing is prepared there yet"):
        open_dataset(settings_for(root, tmp_path), name="tiny")
    with pytest.raises(CacheError, match="'flow' of dataset tiny is not prepared"):
        open_dataset(settings, name="tiny", modalities=["video", "flow"])


def test_damaged_shard_is_named(root, tmp_path):
    settings = settings_for(root, tmp_path, "model.modalities=video")
    folder = Path(prepare(settings).modalities["video"].folder)
    shard = folder / "shard-00001.h5"
    shard.write_bytes(shard.read_bytes()[:3000])
    dataset = open_dataset(settings, name="tiny", modalities=["video"])
    with pytest.raises(CacheError, match=r"shard-00001\.h5"):
        list(dataset.batches(dataset.select(domains=["alpha", "beta"], splits=["train"]), batch_size=2, training=True))
    prepare(settings)  # a damaged shard is written anew
    with h5py.File(shard) as file:
        assert len(file["train/clip"]) > 0


def test_full_disk_while_weights_are_written(root, tmp_path, monkeypatch):
    sets = ("model.modalities=video", "cache.random_weights=true", "modalities.video.cut=layer3")
    settings = settings_for(root, tmp_path, *sets)

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FileError, match="The disk is full"):
        prepare(settings)
    assert not list(tmp_path.glob("tiny/*/*.partial"))
    monkeypatch.undo()
    done = prepare(settings).modalities["video"]
    assert done.shards_reused == done.shards
    folder = Path(done.folder)
    whole = sum((folder / name).stat().st_size for name in ("tail.pt",))
    assert 0 < weights_bytes(settings, "video", settings.modalities["video"]) <= whole


def test_room_for_the_weights_is_counted(root, tmp_path, monkeypatch):
    sets = ("model.modalities=video", "cache.random_weights=true", "modalities.video.cut=pool")
    settings = settings_for(root, tmp_path, *sets)
    monkeypatch.setattr("mbcd_cli.preparation.cache_plan.weights_bytes", lambda *_: 10**15)
    with pytest.raises(CacheError, match=r"The cache needs 1000000\.0 GB more"):
        prepare(settings)


def test_full_disk_is_one_message_and_keeps_what_is_there(root, tmp_path, monkeypatch):
    settings = settings_for(root, tmp_path, "model.modalities=video")
    written = []

    def full(path, *args, **kwargs):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return real(path, *args, **kwargs)

    real = h5py.File
    monkeypatch.setattr(cache_room.h5py, "File", lambda p, m="r", **k: full(p, m, **k) if m == "w" else real(p, m, **k))
    with pytest.raises(FileError, match="The disk is full"):
        prepare(settings)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("tiny/*/shard-*.h5"))) == 1
    assert not list(tmp_path.glob("tiny/*/*.partial"))
    assert prepare(settings).modalities["video"].shards_reused == 1


def test_weights_and_room_for_all_modalities_are_checked_before_anything_is_written(root, tmp_path, monkeypatch):
    cuts = ("modalities.video.cut=layer3", "modalities.audio.cut=layer3", f"cache.weights_dir={tmp_path / 'w'}")
    with pytest.raises(CheckpointError) as caught:
        prepare(settings_for(root, tmp_path / "cache", *cuts, "model.modalities=video,audio"))
    assert str(caught.value).count("has no published weights") == 2
    both = settings_for(root, tmp_path / "cache", "model.modalities=video,audio")
    needed = check(both)
    # Enough for either of the two, but not for both.
    room = max(one.bytes for one in needed.modalities.values()) + 1000
    monkeypatch.setattr("mbcd_cli.preparation.prepare.free_bytes", lambda folder: room)
    with pytest.raises(CacheError, match="The cache needs"):
        prepare(both)
    assert not (tmp_path / "cache").exists()


def test_shards_follow_count_and_bytes(monkeypatch):
    assert shard_ranges([1] * 5, limit=2) == [range(2), range(2, 4), range(4, 5)]
    monkeypatch.setattr(cache_room, "SHARD_BYTES", 10)
    assert shard_ranges([6, 6, 2, 2, 30, 1], limit=9) == [range(1), range(1, 4), range(4, 5), range(5, 6)]
    assert shard_ranges([], limit=3) == []


def test_shards_of_small_rows_hold_more_clips(monkeypatch):
    assert shard_ranges([2**20] * 65) == [range(64), range(64, 65)]
    assert len(shard_ranges([256] * 4096)) == 64  # a dataset that is not large
    assert shard_ranges([256] * 10_000) == [range(4096), range(4096, 8192), range(8192, 10_000)]
    assert len(shard_ranges([256] * 10_000, limit=64)) == 157


def test_views_of_clips():
    assert views_of("train", views=2, test_view="test") == [0, 1]
    assert views_of("train", views=2, test_view="all") == [TEST_VIEW, 0, 1]
    assert views_of("test", views=2, test_view="test") == [TEST_VIEW]
    train, test = (Clips([Clip("a", "d", split, 0, "", {})]) for split in ("train", "test"))
    assert train.digest != test.digest


def test_frozen_trunk_features_are_the_trunks(root, tmp_path):
    """With the cut inside the encoder the cache holds what the trunk gives, and the tail's weights lie beside it."""
    cut = ("modalities.video.cut=layer3", "cache.random_weights=true", "cache.dtype=float32", "model.modalities=video")
    settings = settings_for(root, tmp_path, *cut, "runtime.device=cpu")
    prepare(settings)
    dataset = open_dataset(settings, name="tiny", modalities=["video"])
    modality = dataset.modalities["video"]
    torch.manual_seed(settings.cache.seed)
    trunk, tail = build_encoder("video", modality).cut("layer3")
    for key, value in tail.state_dict().items():
        assert torch.equal(dataset.tail_weights["video"][key], value)
    listing = read_listing(settings)
    index = next(i for i, clip in enumerate(listing.clips) if clip.split == "train")
    views = load_views(listing.clips[index], "video", modality, views=[0, 1], seed=0, dataset=settings.dataset)
    expected = trunk((torch.from_numpy(np.stack([parts[0] for parts in views])),))[0]
    (read,) = dataset.caches["video"].read(np.array([index, index]), np.array([0, 1]))
    assert torch.equal(read, expected)


def test_what_a_trunk_makes_is_refused_where_its_type_cannot_hold_it(root, tmp_path, monkeypatch):
    whole = Trunk.forward
    monkeypatch.setattr(Trunk, "forward", lambda self, parts: tuple(1e7 * part for part in whole(self, parts)))
    cut = ("modalities.video.cut=layer3", "cache.random_weights=true", "model.modalities=video")
    with pytest.raises(CacheError, match="values do not fit float16"):
        prepare(settings_for(root, tmp_path, *cut))


def test_random_trunk_must_be_asked_for(root, tmp_path):
    settings = settings_for(root, tmp_path, "modalities.video.cut=layer3", "model.modalities=video")
    with pytest.raises(Exception, match="--random-weights"):
        prepare(settings)


def copied(prepared, tmp_path: Path) -> Path:
    """A copy of the prepared caches, and the folder of the array-like rows that is going to be damaged."""
    settings, _ = prepared
    shutil.copytree(settings.cache.dir, tmp_path / "cache")
    return next((tmp_path / "cache").glob("*/video-*"))


def stamped_again(path: Path, change) -> None:
    """Change an HDF5 file and give it a checksum that fits: what malice could do, and damage could not."""
    with h5py.File(path, "r+") as file:
        change(file)
    with path.open("r+b") as file:
        file.write(bytes(checksums.USER_BLOCK))
    checksums.stamp(path)


def put(name: str, value):
    def change(file: h5py.File) -> None:
        values = file[name][()]
        del file[name]
        file[name] = np.full(values.shape, value)

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put("clips/label", 10**6), "a label is out of range"),
        (put("clips/label", -3), "a label is out of range"),
        (put("clips/domain", 99), "a domain is out of range"),
        (put("rows/clip", 10**6), "a clip is out of range"),
        (put("rows/view", -5), "a view is out of range"),
        (put("rows/row", 1.5), "no list of whole numbers"),
        (lambda file: file.attrs.__setitem__("recipe", "[" * 100_000), "is damaged"),
    ],
)
def test_an_index_that_leads_out_of_its_tables_is_one_message(prepared, tmp_path, change, told):
    folder = copied(prepared, tmp_path)
    stamped_again(folder / "index.h5", change)
    with pytest.raises(CacheError, match=told):
        ModalityCache(folder)


def outside(file: h5py.File, name: str, values: np.ndarray) -> None:
    file.create_dataset(name, values.shape, values.dtype, external=[("/etc/passwd", 0, values.nbytes)])


def virtual(file: h5py.File, name: str, values: np.ndarray) -> None:
    layout = h5py.VirtualLayout(values.shape, values.dtype)
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", values.shape)
    file.create_virtual_dataset(name, layout)


def link(file: h5py.File, name: str, _: np.ndarray) -> None:
    file[name] = h5py.ExternalLink("/etc/passwd", "/x")


def records(file: h5py.File, name: str, values: np.ndarray) -> None:
    file[name] = np.zeros(values.shape, [("a", "f4"), ("b", "i2")])


@pytest.mark.parametrize("change", [outside, virtual, link, records])
@pytest.mark.parametrize("name", ["test/part0", "test/part0_sum", "clips/label"])
def test_values_from_another_file_are_refused(prepared, tmp_path, name, change):
    folder = copied(prepared, tmp_path)
    index, shard = folder / "index.h5", folder / "shard-00000.h5"

    def changed(file: h5py.File) -> None:
        values = file[name][()]
        del file[name]
        change(file, name, values)

    def told(file: h5py.File) -> None:
        files = json.loads(file["files"].asstr()[()]) | {shard.name: checksums.checksum(shard)}
        del file["files"]
        file["files"] = json.dumps(files)

    stamped_again(index if name.startswith("clips") else shard, changed)
    stamped_again(index, told)
    with pytest.raises(CacheError, match=r"another file|link to something|other arrays|Cannot cast"):
        ModalityCache(folder).shapes()


@pytest.mark.parametrize("name", ["index.h5", "shard-00000.h5"])
def test_a_pipe_in_place_of_a_file_is_one_message(prepared, tmp_path, name):
    folder = copied(prepared, tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CacheError, match="no plain file"):
        ModalityCache(folder).shapes()


def test_rejected_clips_are_a_table_beside_the_cache(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")
    spoilt = next(root.rglob("*.wav"))
    spoilt.write_bytes(b"")
    found = prepare(settings_for(root, tmp_path / "cache", "dataset.max_bad=50%"))
    assert found.exit_code == 0
    table = tmp_path / "cache" / "tiny" / "rejected.csv"
    assert str(spoilt) in table.read_text()
    helpers.write_wav(spoilt, helpers.tone(1.0))
    prepare(settings_for(root, tmp_path / "cache"))
    assert not table.exists()


def test_shards_of_another_layout_leave_nothing_behind(root, tmp_path):
    done = [prepare(settings_for(root, tmp_path, f"cache.shard_clips={n}", "model.modalities=audio")) for n in (1, 5)]
    folder = Path(done[0].modalities["audio"].folder)
    assert [one.modalities["audio"].shards for one in done] == [12, 3]
    assert len(list(folder.glob("shard-*.h5"))) == 3
    assert not examine(folder).faults
