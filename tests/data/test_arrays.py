"""Arrays: their values, lengths that differ, and what float16 takes from them."""

from __future__ import annotations

import pickle
from pathlib import Path

import helpers
import numpy as np
import pytest
from helpers import cause, write_array

from mbcd_cli import console
from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.data.media.arrays import read_array, stored_shape
from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.modalities.modality import load_views
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.records import TEST_VIEW, Clip, Media
from mbcd_cli.data.rounding import Rounding
from mbcd_cli.errors import ManifestError, MediaError
from mbcd_cli.preparation.check import check
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve as resolve_settings
from mbcd_cli.settings import DatasetSettings

DATASET = DatasetSettings()


def clip_of(path: Path) -> Clip:
    return Clip("c0", "a", "train", 0, "0", {"x": Media(path)})


def load(path: Path, settings, views=(TEST_VIEW,), notes: list[str] | None = None) -> list[np.ndarray]:
    loaded = load_views(clip_of(path), "x", settings, views=views, seed=0, dataset=DATASET, notes=notes)
    return [array for (array,) in loaded]


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_arrays(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 3))
    got = read_array(Media(write_array(tmp_path / "a.npy", values)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, values, rtol=1e-6)
    assert read_array(Media(write_array(tmp_path / "i.npy", np.arange(4, dtype=np.int16)))).tolist() == [0, 1, 2, 3]


def test_bad_arrays(tmp_path):
    def why(values: np.ndarray) -> str:
        return cause(lambda: read_array(Media(write_array(tmp_path / "a.npy", values))))

    assert "1 of 4 values are not finite" in why(np.array([0, np.nan, 1, 2]))
    assert "shape" in why(np.zeros((2, 2, 2)))
    assert "shape" in why(np.float64(3.0))
    assert "no values" in why(np.zeros((0, 4)))
    assert "real numbers" in why(np.array(["a", "b"]))
    assert "real numbers" in why(np.array([1j]))
    assert "not finite" in why(np.array([1e300]))  # does not fit float32
    np.save(tmp_path / "p.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    assert "pickled" in cause(lambda: read_array(Media(tmp_path / "p.npy")))
    (tmp_path / "q.npy").write_bytes(pickle.dumps(Hostile()))
    assert cause(lambda: read_array(Media(tmp_path / "q.npy")))
    data = write_array(tmp_path / "t.npy", np.zeros(100)).read_bytes()
    (tmp_path / "t.npy").write_bytes(data[:300])
    assert "cut short" in cause(lambda: read_array(Media(tmp_path / "t.npy")))
    np.savez(tmp_path / "z.npz", a=np.zeros(3))
    assert cause(lambda: read_array(Media(tmp_path / "z.npz")))
    assert cause(lambda: read_array(Media(tmp_path / "none.npy"))) == "no such file"


def test_vectors_and_sequences(tmp_path):
    rng = np.random.default_rng(0)
    vector, long, short = rng.normal(size=5), rng.normal(size=(9, 3)), rng.normal(size=(4, 3))
    (got,) = load(write_array(tmp_path / "v.npy", vector), ArrayModality(dimension=5))
    np.testing.assert_allclose(got, vector, rtol=1e-6)
    settings = ArrayModality(dimension=3, length=6)
    (cut,) = load(write_array(tmp_path / "l.npy", long), settings)
    np.testing.assert_allclose(cut, long[:6], rtol=1e-6)
    (padded,) = load(write_array(tmp_path / "s.npy", short), settings)
    np.testing.assert_allclose(padded, np.concatenate([short, np.zeros((2, 3))]), rtol=1e-6)
    with pytest.raises(MediaError, match=r"shape \[4, 3\] where \[5\]"):
        load(tmp_path / "s.npy", ArrayModality(dimension=5))
    with pytest.raises(MediaError, match=r"shape \[5\] where \[T, 3\]"):
        load(tmp_path / "v.npy", settings)
    one = ArrayModality(dimension=1, length=5)
    assert load(tmp_path / "v.npy", one)[0].shape == (5, 1)


def test_array_noise(tmp_path):
    path = write_array(tmp_path / "v.npy", np.zeros(20000))
    settings = ArrayModality(dimension=20000, noise=0.3)
    train, test = load(path, settings, [0, TEST_VIEW])
    assert train.std() == pytest.approx(0.3, rel=0.03)
    assert train.dtype == np.float32
    assert not test.any()


def test_headers_tell_shapes_without_values(tmp_path):
    for values in (np.zeros(7), np.zeros((4, 3), np.int16), np.asfortranarray(np.zeros((40, 5), ">f4"))):
        assert stored_shape(write_array(tmp_path / "a.npy", values)) == values.shape
    with (tmp_path / "b.npy").open("wb") as file:
        np.lib.format.write_array(file, np.zeros((6, 2)), version=(2, 0))
    assert stored_shape(tmp_path / "b.npy") == (6, 2)
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00garbage")
    assert stored_shape(tmp_path / "c.npy") is None
    assert stored_shape(tmp_path / "none.npy") is None


def test_resolving_array_shapes(tmp_path):
    vector = Media(write_array(tmp_path / "v.npy", np.zeros(7)))
    sequence = Media(write_array(tmp_path / "s.npy", np.zeros((4, 3))))
    lost = Media(tmp_path / "none.npy")
    assert ArrayModality().resolve([lost, vector]) == ArrayModality(dimension=7)
    assert ArrayModality().resolve([sequence]) == ArrayModality(dimension=3, length=4)
    assert ArrayModality(length=9).resolve([sequence]) == ArrayModality(dimension=3, length=9)
    assert ArrayModality(length=9).resolve([vector]) == ArrayModality(dimension=1, length=9)
    assert ArrayModality(dimension=3).resolve([sequence]) == ArrayModality(dimension=3, length=4)
    fixed = ArrayModality(dimension=2)
    assert fixed.resolve([lost]) is fixed
    video = VideoModality()
    assert video.resolve([lost]) is video
    with pytest.raises(MediaError, match="no such file"):
        ArrayModality().resolve([lost])


# --- lengths that differ -------------------------------------------------------------------------------------------


def test_the_longest_file_fixes_the_length(tmp_path):
    media = [Media(write_array(tmp_path / f"{n}.npy", np.zeros((n, 2)))) for n in (3, 40, 55, 12)]
    media.append(Media(write_array(tmp_path / "odd.npy", np.zeros((90, 3)))))  # will be rejected: not of this shape
    notes: list[str] = []
    assert ArrayModality().resolve(media, name="pose", notes=notes) == ArrayModality(dimension=2, length=55)
    (note,) = notes
    assert "pose: sequences of 3 to 55 steps, padded with zeros to 55" in note
    assert "modalities.pose.length" in note
    notes.clear()
    assert ArrayModality().resolve(media[:1] * 2, notes=notes).length == 3
    assert ArrayModality(length=8).resolve(media, notes=notes).length == 8
    assert not notes
    ArrayModality(fit="sample").resolve(media, name="pose", notes=notes)
    assert "each spread over 55" in notes[0]


def test_padded_cut_and_sampled(tmp_path):
    rising = np.repeat(np.arange(1.0, 13.0)[:, None], 2, axis=1)
    path = write_array(tmp_path / "a.npy", rising)
    notes: list[str] = []
    assert load(path, ArrayModality(dimension=2, length=15), notes=notes)[0][:, 0].tolist() == [*range(1, 13), 0, 0, 0]
    assert not notes
    assert load(path, ArrayModality(dimension=2, length=5), [TEST_VIEW, 0], notes)[1][:, 1].tolist() == [1, 2, 3, 4, 5]
    assert notes == [f"{path}: 12 steps, cut to the first 5"]
    sampled = ArrayModality(dimension=2, length=4, fit="sample")
    notes.clear()
    assert load(path, sampled, notes=notes)[0][:, 0].tolist() == [2, 5, 8, 11]
    assert load(path, ArrayModality(dimension=2, length=24, fit="sample"))[0][::2, 0].tolist() == list(range(1, 13))
    drawn = np.stack(load(path, sampled, range(200)))[:, :, 0].astype(int)
    for segment in range(4):  # every step of each quarter, and none of another
        assert sorted(set(drawn[:, segment].tolist())) == list(range(3 * segment + 1, 3 * segment + 4))
    assert not notes


def sequences(root: Path, make) -> Path:
    """A dataset whose vectors are replaced by `make(number)`."""
    helpers.write_dataset(root)
    for number, path in enumerate(sorted((root / "pose").glob("*.npy"))):
        write_array(path, make(number))
    return root


def tree(root: Path, cache: Path, *sets: str):
    sets = ["model.modalities=pose", "modalities.pose.kind=array", *sets]
    return resolve_settings(sets=[*helpers.SMALL, *sets], flags={"dataset.root": root, "cache.dir": cache})


def rows_of(settings) -> list[np.ndarray]:
    cache = open_dataset(settings, name="tiny", modalities=["pose"]).caches["pose"]
    clips = np.flatnonzero(cache.stored(TEST_VIEW))
    (rows,) = cache.read(clips, np.full(len(clips), TEST_VIEW))
    return rows.numpy()


def test_sequences_of_different_lengths_end_to_end(tmp_path, capfd):
    lengths = [3 + 4 * n for n in range(12)]
    root = sequences(tmp_path / "tiny", lambda n: np.full((lengths[n], 2), n + 1.0))
    padded = tree(root, tmp_path / "cache")
    expected = "pose: sequences of 3 to 47 steps, padded with zeros to 47"
    assert any(expected in line for line in check(padded).layout)
    prepare(padded, say=console.terminal)
    assert expected in " ".join("".join(capfd.readouterr()).split())
    rows = rows_of(padded)
    assert rows.shape[1:] == (47, 2)
    for row in rows:
        number = int(row[0, 0]) - 1
        assert (row[: lengths[number]] == number + 1).all()
        assert not row[lengths[number] :].any()
    sampled = tree(root, tmp_path / "cache", "modalities.pose.length=6", "modalities.pose.fit=sample")
    prepare(sampled)
    assert rows_of(sampled).shape[1:] == (6, 2)
    assert rows_of(sampled).all()  # nothing is padded
    assert rows_of(padded).shape[1:] == (47, 2)  # another recipe, another cache


def test_whole_numbers_stay_whole_through_the_cache(tmp_path):
    """Identities of tokens: any int32, of sequences of several lengths, whatever the type of what is stored."""
    first = 2**31 - 20
    root = sequences(tmp_path / "tiny", lambda n: np.full((2 + n, 1), first + n, np.int64))
    settings = tree(root, tmp_path / "cache", "modalities.pose.whole=true")
    prepare(settings)
    rows = rows_of(settings)
    assert rows.dtype == np.int32
    assert set(rows[:, 0, 0].tolist()) <= {first + n for n in range(12)}
    assert rows.max() > first  # float32 knows steps of 128 only here
    whole = ArrayModality(dimension=1, length=3, whole=True)
    for number, bad in enumerate((np.full(3, 0.5), np.full(3, 2**31), np.full(3, 1.0))):
        with pytest.raises(MediaError, match="whole numbers"):
            load(write_array(tmp_path / f"{number}.npy", bad), whole)
    with pytest.raises(ValueError, match="no noise"):
        ArrayModality(whole=True, noise=0.1)


# --- what is rounded away ------------------------------------------------------------------------------------------


def test_rounding_against_its_definition():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 4)) * [1, 1e-8, 0.3, 0] + [0, 0, 1013, 5000.5]
    with np.errstate(under="ignore"):
        stored = values.astype(np.float16)
    rounding = Rounding()
    for at in range(0, 500, 7):
        rounding.add(values[None, at : at + 7], stored[None, at : at + 7])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.sqrt(((stored - values) ** 2).mean(0)) / values.std(0)
    np.testing.assert_allclose(rounding.shares[:3], share[:3], rtol=1e-4)
    assert rounding.shares[3] == 0  # a column that says nothing has nothing to lose
    assert "the spread of 2 of 4 columns" in str(rounding)
    assert not rounding.whole
    assert not str(Rounding())


@pytest.mark.parametrize(
    ("scale", "offset", "told"), [(1.0, 0.0, ""), (0.3, 1013.0, "3 of 3 columns"), (1e-8, 0.0, "3 of 3 columns")]
)
def test_what_float16_loses_is_told(tmp_path, capfd, scale, offset, told):
    root = sequences(tmp_path / "tiny", lambda n: offset + scale * np.random.default_rng(n).normal(size=3))
    for _ in range(2):  # the second time from the index: all is reused
        done = prepare(tree(root, tmp_path / "cache"), say=console.terminal).modalities["pose"]
        out = " ".join("".join(capfd.readouterr()).split())
        assert told in done.float16_loss
        assert bool(told) == bool(done.float16_loss)
        assert ("--set cache.dtype=float32" in out) == bool(told)
    assert not prepare(tree(root, tmp_path / "cache", "cache.dtype=float32")).modalities["pose"].float16_loss


def test_whole_numbers_are_kept_or_told(tmp_path):
    root = sequences(tmp_path / "tiny", lambda n: np.array([n, 2048 - n, -n]))
    done = prepare(tree(root, tmp_path / "cache")).modalities["pose"]
    assert not done.float16_loss
    assert (rows_of(tree(root, tmp_path / "cache"))[:, :2].sum(axis=1) == 2048).all()
    root = sequences(tmp_path / "large" / "tiny", lambda n: np.array([3001 * (n + 1), 5]))
    done = prepare(tree(root, tmp_path / "cache2")).modalities["pose"]
    assert "whole numbers" in done.float16_loss
    notes: list[str] = []
    path = write_array(tmp_path / "big.npy", np.array([2**24 + 1, 3]))
    read_array(Media(path), notes)
    assert "whole numbers over 16777216" in notes[0]
    notes.clear()
    read_array(Media(write_array(path, np.array([2**24, 2**30]))), notes)
    assert not notes


# --- packed arrays -------------------------------------------------------------------------------------------------


def packed_dataset(root: Path, values: np.ndarray, *, packed: bool, rows: list[int] | None = None) -> Path:
    """Clips of two domains; one array per domain, or the same values in a file per clip. Labels 0, 1, 0, ..."""
    lines = []
    for index in range(len(values)):
        domain, place = "ab"[index % 2], index // 2
        file = f"x/{domain}.npy#{place if rows is None else rows[index]}" if packed else f"x/{index}.npy"
        if not packed:
            write_array(root / file, values[index])
        split = "test" if index % 3 == 0 else "train"
        lines.append({"id": f"c{index}", "domain": domain, "split": split, "label": place % 2, "x": file})
    if packed:
        for number, domain in enumerate("ab"):
            write_array(root / f"x/{domain}.npy", values[number::2])
    helpers.write_manifest(root / "manifest.csv", lines)
    return root


def cached_rows(root: Path, cache: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What `prepare` says, and id -> the stored test view."""
    settings = resolve_settings(
        flags={"dataset.root": root, "cache.dir": cache, "cache.workers": 0},
        sets=["dataset.target_split=all", "cache.views=1"],
    )
    done = prepare(settings)
    dataset = open_dataset(settings, name=done.dataset)
    clips = dataset.select(domains=dataset.domains)
    (batch,) = dataset.batches(clips, batch_size=len(clips), training=False)
    ids = [dataset.clips.ids[i] for i in clips]
    return done, dict(zip(ids, batch.inputs["x"][0].numpy(), strict=True))


@pytest.mark.parametrize("shape", [(5,), (4, 3)])
def test_rows_of_a_packed_array_are_what_files_are(tmp_path, shape):
    values = np.random.default_rng(0).normal(size=(12, *shape)).astype(np.float32)
    files = cached_rows(packed_dataset(tmp_path / "files", values, packed=False), tmp_path / "one")[1]
    done, packed = cached_rows(packed_dataset(tmp_path / "packed", values, packed=True), tmp_path / "two")
    assert done.rejected == []
    assert list(files) == list(packed)
    for name in files:
        np.testing.assert_array_equal(files[name], packed[name])


def test_rows_are_read_without_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("mbcd_cli.data.media.decoding.Decoder._start", lambda self: pytest.fail("a worker"))
    root = packed_dataset(tmp_path / "packed", np.zeros((12, 5), np.float32), packed=True)
    settings = resolve_settings(flags={"dataset.root": root, "cache.dir": tmp_path / "cache", "cache.workers": 2})
    assert prepare(settings).modalities["x"].clips == 12


def test_bad_rows_cost_their_clips(tmp_path):
    values = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    values[2, 1] = np.nan
    rows = [index // 2 for index in range(12)]
    rows[5] = 6
    done, packed = cached_rows(packed_dataset(tmp_path / "packed", values, packed=True, rows=rows), tmp_path / "cache")
    told = {bad.clip: (Path(bad.file).name, bad.cause) for bad in done.rejected}
    assert told == {
        "c2": ("a.npy#1", "1 of 5 values are not finite (NaN or infinity)"),
        "c5": ("b.npy#6", "the file has 6 rows, counted from 0"),
    }
    assert set(packed) == {f"c{index}" for index in range(12)} - {"c2", "c5"}


def test_a_bad_packed_array_costs_all_that_name_it(tmp_path):
    root = packed_dataset(tmp_path / "packed", np.zeros((12, 5), np.float32), packed=True)
    write_array(root / "x/a.npy", np.zeros(6))
    done, packed = cached_rows(root, tmp_path / "cache")
    assert {bad.cause for bad in done.rejected} == {"shape [6] where a packed array, [N, D] or [N, T, D], is expected"}
    assert set(packed) == {f"c{index}" for index in range(1, 12, 2)}


@pytest.mark.parametrize("row", ["-1", "", "one", "1.0"])
def test_a_row_that_is_no_number_is_a_bad_line(tmp_path, row):
    root = packed_dataset(tmp_path / "packed", np.zeros((4, 2), np.float32), packed=True)
    table = root / "manifest.csv"
    table.write_text(table.read_text().replace("a.npy#1", f"a.npy#{row}"))
    with pytest.raises(ManifestError, match=rf"line 4: x: row '{row}' of x/a.npy is not a whole number"):
        prepare(resolve_settings(flags={"dataset.root": root, "cache.dir": tmp_path / "cache"}))


def test_a_packed_array_that_is_replaced_is_read_anew(tmp_path):
    path = write_array(tmp_path / "a.npy", np.zeros((3, 2), np.float32))
    one = Media(path, start=1, stop=2, unit="row")
    assert read_array(one).tolist() == [0, 0]
    write_array(tmp_path / "b.npy", np.ones((4, 2), np.float32)).replace(path)
    assert read_array(one).tolist() == [1, 1]
    path.unlink()
    assert cause(lambda: read_array(one)) == "no such file"


def test_a_packed_array_named_without_a_row_is_told_how_rows_are_named(tmp_path):
    path = write_array(tmp_path / "all.npy", np.zeros((12, 5)))
    with pytest.raises(MediaError, match=r"shape \[12, 5\] where \[5\] is expected") as caught:
        load(path, ArrayModality(dimension=5))
    assert "FILE.npy#0" in caught.value.remedy
