"""Batches read ahead, and rows kept on a device: the same values in the same order."""

from __future__ import annotations

import threading
from dataclasses import fields
from types import SimpleNamespace

import memory
import numpy as np
import pytest
import torch
from helpers import write_dataset

from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.data.loading import ResidentRows, keep_on_device, read_ahead, resident_bytes
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import CacheError, SettingsError
from mbcd_cli.preparation import prepare as command
from mbcd_cli.resolved import validate


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "mbcd-read-ahead"]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_order_is_kept_and_reading_stays_ahead_by_depth(depth):
    taken, ahead, far = [], [], threading.Event()

    def batches():
        for number in range(8):
            ahead.append(number - len(taken))
            if number == depth:
                far.set()
            yield number

    ready = read_ahead(batches(), depth=depth)
    for number in ready:
        assert far.wait(60), "the first `depth` batches after it are read without being asked for"
        taken.append(number)
    assert taken == list(range(8))
    assert max(ahead) <= 1 + depth  # one that is not yet taken is on its way, and one more in the thread's hand
    assert not threads()


def test_an_error_arrives_in_its_place():
    def batches():
        yield 1
        raise CacheError("the shard is gone", "prepare again")

    ready = read_ahead(batches(), depth=2)
    assert next(ready) == 1
    with pytest.raises(CacheError, match="the shard is gone"):
        next(ready)
    assert not threads()


def test_closing_ends_the_thread():
    ready = read_ahead(iter(range(1000)), depth=2)
    assert next(ready) == 0
    assert threads()
    ready.close()
    assert not threads()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = write_dataset(tmp_path_factory.mktemp("media") / "tiny", train=3, test=2)
    settings = validate(
        {
            "dataset": {"root": root, "name": "tiny"},
            "modalities": {"pose": {"kind": "array"}, "audio": {"kind": "audio", "samples": 2000}},
            "model": {"modalities": ("pose", "audio")},
            "cache": {"dir": root.parent / "cache", "views": 3, "workers": 0},
        }
    )
    command.prepare(settings)
    return open_dataset(settings, name="tiny", modalities=("pose", "audio"))


def test_the_open_cache_is_what_the_protocol_says(dataset):
    assert isinstance(dataset, Dataset)
    held = {field.name for field in fields(memory.ArrayDataset)} | {*dir(memory.ArrayDataset)}
    assert {*Dataset.__annotations__} <= held


def test_resident_rows_are_the_cache(dataset):
    training = dataset.select(domains=["alpha"], splits=("train",))
    testing = dataset.select(domains=dataset.domains, splits=("test",))
    rows = ResidentRows(dataset, training=training, testing=testing, device=torch.device("cpu"))
    for clips, is_training in ((training, True), (testing, False)):
        options = {"batch_size": 3, "training": is_training, "seed": 4, "epoch": 1}
        pairs = zip(dataset.batches(clips, **options), dataset.batches(clips, read=rows.read, **options), strict=True)
        for stored, resident in pairs:
            assert torch.equal(stored.clips, resident.clips)
            for name in ("pose", "audio"):
                assert torch.equal(stored.inputs[name][0], resident.inputs[name][0])
    held = sum(part.nbytes for parts in rows._parts.values() for part in parts)
    assert resident_bytes(dataset, training=training, testing=testing) == held


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_every_batch_in_order(dataset, world):
    clips = dataset.select(domains=dataset.domains, splits=("train",))
    options = {"batch_size": 6, "training": True, "seed": 2, "epoch": 3, "drop_last": True, "start": 1}
    whole = list(dataset.batches(clips, **options))
    shares = [list(dataset.batches(clips, share=(rank, world), **options)) for rank in range(world)]
    for index, batch in enumerate(whole):
        parts = [share[index] for share in shares]
        assert torch.equal(torch.cat([part.clips for part in parts]), batch.clips)
        assert torch.equal(torch.cat([part.inputs["audio"][0] for part in parts]), batch.inputs["audio"][0])
        assert {len(part) for part in parts} == {6 // world}


def test_where_the_cache_is_kept(monkeypatch):
    cache = SimpleNamespace(views=4, shapes=lambda view: [((256, 1024), np.dtype(np.float16))])
    dataset = SimpleNamespace(caches={"video": cache})
    clips = np.arange(512)  # 512 clips x 4 views and 64 test views of 512 KiB: 1056 MiB
    case = {"training": clips, "testing": [clips[:32], clips[16:64]]}
    cuda, free = torch.device("cuda"), 3 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    made = []
    monkeypatch.setattr("mbcd_cli.data.loading.ResidentRows", lambda *args, **options: made.append(1) or "resident")
    assert resident_bytes(dataset, training=clips, testing=clips[:64]) == 1056 * 2**20
    assert keep_on_device(dataset, where="auto", device=cuda, **case) == "resident"
    assert keep_on_device(dataset, where="host", device=cuda, **case) is None
    assert keep_on_device(dataset, where="auto", device=torch.device("cpu"), **case) is None
    free = 2 * 2**30
    assert keep_on_device(dataset, where="auto", device=cuda, **case) is None  # more than half of what is free
    assert keep_on_device(dataset, where="cuda", device=cuda, **case) == "resident"
    free = 2**30
    with pytest.raises(SettingsError, match="GB free"):
        keep_on_device(dataset, where="cuda", device=cuda, **case)
    with pytest.raises(SettingsError, match="runs on cpu"):
        keep_on_device(dataset, where="cuda", device=torch.device("cpu"), **case)
    assert len(made) == 2
