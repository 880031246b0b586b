from __future__ import annotations

import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from landscape_cases import Quadratic, symmetric

from mbcd_cli.landscape.store import GridStore, StoreError, axis, read_grid
from mbcd_cli.landscape.surface import fill_grid
from mbcd_cli.place import Place

IDENTITY = {"weights": "abc", "directions": {"seed": 0}}


def quadratic(n=3):
    return Quadratic(symmetric(np.arange(1, n + 1)), {"w": torch.zeros(n, dtype=torch.float64)})


def plane(n=3):
    eye = torch.eye(n, dtype=torch.float64)
    return [{"w": eye[0]}, {"w": eye[1]}]


def fill(path, points, loss=None, **options):
    loss = loss or quadratic()
    with GridStore(path, x=axis(1, points), y=axis(1, points), identity=IDENTITY, **options) as store:
        fill_grid(store, loss, plane())
    return loss


def test_values_are_those_of_the_quadratic(tmp_path):
    loss = fill(tmp_path / "s.h5", 5)
    grid = read_grid(tmp_path / "s.h5")
    a = loss.matrix.numpy()
    for row, y in enumerate(grid.y):
        for column, x in enumerate(grid.x):
            v = np.array([x, y, 0.0])
            assert grid.loss[row, column] == pytest.approx(0.5 * v @ a @ v, abs=1e-14)
    assert grid.missing == 0
    np.testing.assert_allclose(grid.accuracy, 1 / (1 + grid.loss))
    assert [p.name for p in tmp_path.iterdir()] == ["s.h5"]
    with h5py.File(tmp_path / "s.h5") as file:  # any HDF5 tool can open it
        assert file["loss"].shape == (5, 5)


def test_coordinates_shared_by_grids_are_equal_bit_for_bit():
    assert set(axis(1.3, 15)) <= set(axis(1.3, 29))
    assert axis(1, 15)[7] == 0.0
    np.testing.assert_allclose(axis(0.7, 12), np.linspace(-0.7, 0.7, 12))


def test_a_finer_grid_measures_only_what_is_new_and_forgets_nothing(tmp_path):
    path = tmp_path / "s.h5"
    assert fill(path, 5).calls == 25
    assert fill(path, 5).calls == 0
    assert fill(path, 9).calls == 81 - 25
    assert fill(path, 4).calls == 16 - 4  # only the corners are shared
    assert read_grid(path).loss.shape == (4, 4)
    assert len(read_grid(path).points) == 81 + 12
    assert fill(path, 9).calls == 0
    assert fill(path, 5, overwrite=True).calls == 25


def test_an_interrupted_grid_has_holes_and_is_resumed(tmp_path):
    path = tmp_path / "s.h5"
    loss = quadratic()
    measure = loss.measure

    def stops(moved):
        if loss.calls == 7:
            raise KeyboardInterrupt
        return measure(moved)

    loss.measure = stops
    with pytest.raises(KeyboardInterrupt):
        fill(path, 5, loss)
    grid = read_grid(path)
    assert grid.missing == 25 - 7
    assert np.isnan(grid.loss).sum() == 25 - 7
    assert fill(path, 5).calls == 18


def test_non_finite_losses_are_computed_points(tmp_path):
    path = tmp_path / "s.h5"
    with GridStore(path, x=axis(1, 3), y=axis(1, 3), identity=IDENTITY) as store:
        store.record(0, 0, float("nan"), 0.1)
        store.record(1, 2, float("inf"), 0.1)
        store.record(1, 1, 2.0, 0.5)
    grid = read_grid(path)
    assert (grid.non_finite, grid.missing) == (2, 6)
    assert np.isinf(grid.loss[1, 2])
    with GridStore(path, x=axis(1, 3), y=axis(1, 3), identity=IDENTITY) as store:
        assert len(store.missing()) == 6


def test_a_file_of_something_else_is_refused_by_name(tmp_path):
    path = tmp_path / "s.h5"
    fill(path, 3)
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        GridStore(path, x=axis(1, 3), identity={"weights": "xyz", "directions": {"seed": 1}, "loss": "total"})
    text = str(caught.value)
    assert "weights: 'abc' in the file, 'xyz' now" in text
    assert "directions.seed: 0 in the file, 1 now" in text
    assert "loss: None in the file, 'total' now" in text
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "text", "foreign", "shapes"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "s.h5"
    fill(path, 3)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:700])
    elif damage == "text":
        path.write_text("hello")
    else:
        with h5py.File(path, "r+") as file:
            if damage == "foreign":
                file.attrs["format"] = "something"
            else:
                del file["loss"]
                file["loss"] = np.zeros((2, 9))
    with pytest.raises(StoreError, match=r"s\.h5"):
        read_grid(path)
    with pytest.raises(StoreError, match=r"s\.h5"):
        fill(path, 3)


def test_two_processes_do_not_fill_one_file(tmp_path):
    with (
        GridStore(tmp_path / "s.h5", x=axis(1, 3), identity=IDENTITY),
        pytest.raises(StoreError, match="another process"),
    ):
        GridStore(tmp_path / "s.h5", x=axis(1, 3), identity=IDENTITY)


def test_a_torn_journal_line_is_dropped(tmp_path):
    path = tmp_path / "s.h5"
    store = GridStore(path, x=axis(1, 3), identity=IDENTITY, fold_seconds=1e9)
    store.record(0, 0, 1.25, 0.5)
    store.record(0, 1, 2.5, 0.5)
    journal = tmp_path / "s.h5.journal-0"
    journal.write_bytes(journal.read_bytes()[:-3])
    store._journal.close()  # as a kill would
    assert read_grid(path).loss[0].tolist()[:1] == [1.25]
    assert read_grid(path).missing == 2
    with GridStore(path, x=axis(1, 3), identity=IDENTITY) as again:
        assert again.missing().tolist() == [[0, 1], [0, 2]]
    assert not journal.exists()


# Without torch, so that the process starts quickly.
_KILLED = """
import itertools, sys
from types import SimpleNamespace
from mbcd_cli.landscape import store as module
from mbcd_cli.landscape.store import GridStore, axis
x = axis(1, 41)
identity = {"weights": "abc", "directions": {"seed": 0}}
looks = itertools.count()
module.time = SimpleNamespace(monotonic=lambda: next(looks))  # a second goes by at each look: folded every seventh time
with GridStore(sys.argv[1], x=x, y=x, identity=identity, fold_seconds=7) as store:
    for number, (row, column) in enumerate(store.missing(), start=41 * 41 - len(store.missing()) + 1):
        sys.stdin.readline()
        store.record(row, column, x[column] ** 2 + 2 * x[row], 0.5)
        print(number, flush=True)
"""


def test_kill_9_loses_at_most_the_point_in_flight(tmp_path):
    path = tmp_path / "s.h5"
    done = 0
    for round_ in range(3):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", _KILLED, path], **pipes, text=True)
        process.stdin.write(400 * "\n")  # a point each: it is killed in the midst of them
        process.stdin.flush()
        lines = [process.stdout.readline() for _ in range(30 + 11 * round_)]
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        process.wait()
        reported = int([line for line in (*lines, *rest.split("\n")) if line.strip()][-1])
        grid = read_grid(path)  # readable although its writer was killed
        assert reported <= int(grid.computed.sum()) <= reported + 1
        assert reported > done
        done = int(grid.computed.sum())
    x = axis(1, 41)
    with GridStore(path, x=x, y=x, identity=IDENTITY) as store:
        assert len(store.missing()) == 41 * 41 - done
        for row, column in store.missing():
            store.record(row, column, x[column] ** 2 + 2 * x[row], 0.5)
    assert np.array_equal(read_grid(path).loss, x[None] ** 2 + 2 * x[:, None])
    assert [p.name for p in tmp_path.iterdir()] == ["s.h5"]


def test_processes_share_a_grid_through_their_journals(tmp_path):
    path = tmp_path / "s.h5"
    options = {"x": axis(1, 5), "y": axis(1, 5), "identity": IDENTITY}
    with GridStore(path, **options) as first:
        with GridStore(path, **options, rank=1) as second:
            fill_grid(first, quadratic(), plane(), place=Place(0, 2))
            fill_grid(second, quadratic(), plane(), place=Place(1, 2))
        assert read_grid(path).missing == 0
        first.fold(ranks=True)
    assert read_grid(path).missing == 0
    fill(tmp_path / "alone.h5", 5)
    assert np.array_equal(read_grid(path).loss, read_grid(tmp_path / "alone.h5").loss)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.h5", "s.h5"]
    # a rank that was killed left its journal: the next run takes it over
    lone = GridStore(path, **{**options, "x": axis(1, 9)})
    killed = GridStore(path, **{**options, "x": axis(1, 9)}, rank=1)
    fill_grid(killed, quadratic(), plane(), place=Place(1, 2))
    killed._journal.close()
    lone.close()
    assert fill_count(path, {**options, "x": axis(1, 9)}) == 10


def fill_count(path, options):
    loss = quadratic()
    with GridStore(path, **options) as store:
        fill_grid(store, loss, plane())
    return loss.calls
