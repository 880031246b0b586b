"""int8 caches: values within half a scale, the error reported, read back as floats; caches of other versions."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import helpers
import numpy as np
import pytest
import torch

from mbcd_cli import checksums
from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.data.quantise import quantise, restore, scale_shape, squared_error
from mbcd_cli.data.records import TEST_VIEW
from mbcd_cli.errors import CacheError
from mbcd_cli.preparation.check import check
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve


def tree(root: Path, cache: Path, *sets: str):
    cut = ["modalities.video.cut=layer3", "cache.random_weights=true"]
    return resolve(sets=[*helpers.SMALL, *cut, *sets], flags={"dataset.root": root, "cache.dir": cache})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return helpers.write_dataset(tmp_path_factory.mktemp("media") / "tiny")


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 7), (5, 3, 2)])
def test_rounding_is_within_half_a_scale_of_each_channel(shape):
    rng = np.random.default_rng(0)
    values = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3, size=(*shape[:2], *[1] * (len(shape) - 2)))
    values[0, 0] = 0.0
    stored, scales = quantise(values)
    assert stored.dtype == np.int8
    assert scales.shape == shape[:1] + scale_shape(shape[1:])
    wide = scales.reshape(scales.shape + (1,) * (len(shape) - scales.ndim)).astype(np.float64)
    back = restore(stored, scales)
    assert back.dtype == np.float32
    assert (np.abs(back - values) <= 0.5 * wide * (1 + 1e-4) + 1e-12).all()
    if len(shape) > 2:
        assert (back[0, 0] == 0).all()
        assert np.abs(stored[1:]).max(axis=tuple(range(2, len(shape)))).min() == 127
    error, power = squared_error(values, stored, scales)
    assert error == pytest.approx(((back - values) ** 2).sum(), rel=1e-3, abs=1e-9)
    assert power == pytest.approx((values**2).sum(), rel=1e-5)


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_int8_cache(root, tmp_path, compression):
    exact = tree(root, tmp_path / "exact", "cache.dtype=float32")
    small = tree(root, tmp_path / "small", "cache.dtype=int8", f"cache.compression={compression}")
    planned = check(small)
    prepare(exact)
    done = prepare(small)
    a, b = (open_dataset(one, name="tiny") for one in (exact, small))
    for name in ("video", "audio"):
        errors = powers = 0.0
        for view in (TEST_VIEW, 0, 1):
            clips = np.flatnonzero(a.caches[name].stored(view))
            views = np.full(len(clips), view)
            (want,), (have,) = (d.caches[name].read(clips, views) for d in (a, b))
            assert have.dtype == torch.float32
            assert b.caches[name].shapes(view) == [(tuple(want.shape[1:]), np.dtype(np.float32))]
            channels = want.abs().flatten(2).amax(2).reshape(*want.shape[:2], *[1] * (want.dim() - 2))
            assert ((have - want).abs() <= channels / 127 * 0.5 * 1.001 + 1e-7).all()
            errors += float(((have - want).double() ** 2).sum())
            powers += float((want.double() ** 2).sum())
        assert done.modalities[name].int8_error == pytest.approx((errors / powers) ** 0.5, rel=1e-3)
        assert 0 < done.modalities[name].int8_error < 0.05
        if compression == "none":
            rows = planned.modalities[name].bytes
            assert rows <= done.modalities[name].bytes < rows + 20_000 * done.modalities[name].shards
    assert prepare(small).modalities["video"].int8_error == done.modalities["video"].int8_error
    with pytest.raises(CacheError, match="dtype: cache has int8, settings say float16"):
        open_dataset(tree(root, tmp_path / "small", "cache.dtype=float16"), name="tiny")


def test_frames_stay_bytes_and_need_no_scale(root, tmp_path):
    settings = tree(root, tmp_path, "cache.dtype=int8", "modalities.video.cut=input", "model.modalities=video")
    done = prepare(settings).modalities["video"]
    assert done.int8_error is None
    (part,) = (
        open_dataset(settings, name="tiny", modalities=["video"]).caches["video"].read(np.array([0]), np.array([0]))
    )
    assert part.dtype == torch.uint8


def test_caches_of_another_version(root, tmp_path):
    """They are named with what to do; and are in nobody's way beside a newer one."""
    settings = tree(root, tmp_path, "model.modalities=video")
    folder = Path(prepare(settings).modalities["video"].folder)
    old = folder.with_name("video-000000000000")
    old.mkdir()
    (old / "index.h5").write_bytes((folder / "index.h5").read_bytes())
    with h5py.File(old / "index.h5", "r+") as file:
        file.attrs["format"] = 0
        file.attrs["mbcd_version"] = "0.0.1"
    checksums.stamp(old / "index.h5")
    open_dataset(settings, name="tiny", modalities=["video"])
    kept = folder.rename(tmp_path / "kept")
    with pytest.raises(CacheError, match=r"another version of mbcd \(0\.0\.1\).*\n.*mbcd prepare"):
        open_dataset(settings, name="tiny", modalities=["video"])
    # The same for an index that lacks a table, and for settings that this version does not have.
    for spoil in ("table", "settings"):
        (old / "index.h5").write_bytes((kept / "index.h5").read_bytes())
        with h5py.File(old / "index.h5", "r+") as file:
            if spoil == "table":
                del file["rows"]
            else:
                modality = json.loads(file.attrs["modality_settings"]) | {"gone": 1}
                file.attrs["modality_settings"] = json.dumps(modality)
        checksums.stamp(old / "index.h5")
        with pytest.raises(CacheError, match="another version of mbcd"):
            open_dataset(settings, name="tiny", modalities=["video"])
    # A shard is of the version of its index: what it lacks is damage.
    kept.rename(folder)
    with h5py.File(folder / "shard-00000.h5", "r+") as file:
        del file["train"]
    dataset = open_dataset(settings, name="tiny", modalities=["video"])
    with pytest.raises(CacheError, match="is damaged"):
        dataset.caches["video"].read(np.array([0]), np.array([0]))
