from __future__ import annotations

import numpy as np
import pytest
import torch
from landscape_cases import Quadratic, make_checkpoint, make_dataset, make_model, make_settings, symmetric

from mbcd_cli.errors import CheckpointError, SettingsError
from mbcd_cli.landscape import measure as command
from mbcd_cli.landscape.directions import move, moving_names
from mbcd_cli.landscape.paths import barrier, buffers_of, line, plane, trajectory_plane, vector_of
from mbcd_cli.landscape.store import GridStore, read_grid
from mbcd_cli.landscape.surface import fill_grid


def vec(*values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


def values_on(path, loss, direction, points=21):
    with GridStore(path, x=np.linspace(0, 1, points), identity={}) as store:
        fill_grid(store, loss, [direction])
    return read_grid(path)


class DoubleWell(Quadratic):
    """(x^2 - 1)^2 + y^2 + x: two minima with a ridge between them."""

    def __init__(self, start):
        super().__init__(np.eye(2), start)

    def loss(self, moved):
        x, y = moved["w"]
        return (x**2 - 1) ** 2 + y**2 + 0.1 * x


def test_barrier_of_a_double_well(tmp_path):
    loss = DoubleWell(vec(-1.0, 0.0))
    away = line(loss.start, vec(1.0, 0.0), names=["w"], label="b")
    found = barrier(values_on(tmp_path / "p.h5", loss, away, 201))
    # On the path x = 2t - 1 the linear part cancels: excess (x^2 - 1)^2, 1 at x = 0.
    assert found.height == pytest.approx(1.0, abs=1e-12)
    assert found.at == pytest.approx(0.5)


def test_a_convex_path_has_no_barrier_and_nan_is_counted(tmp_path):
    loss = Quadratic(np.eye(2), vec(1.0, 2.0))
    away = line(loss.start, vec(-1.0, 0.5), names=["w"], label="b")
    assert barrier(values_on(tmp_path / "p.h5", loss, away)).height == 0
    with GridStore(tmp_path / "n.h5", x=np.linspace(0, 1, 3), identity={}) as store:
        for column, value in enumerate([1.0, np.nan, 1.0]):
            store.record(0, column, value, 0.5)
    assert barrier(read_grid(tmp_path / "n.h5")).non_finite == 1


def test_plane_through_three_points():
    a, b, c = vec(1.0, 0.0, 2.0), vec(3.0, 0.0, 2.0), vec(2.0, 5.0, 2.0)
    found = plane(a, {"b": b, "c": c}, names=["w"], label="a", other={})
    assert found.places["b"] == (1.0, 0.0)
    assert found.places["c"] == pytest.approx((0.5, 2.5))
    for label, point in (("b", b), ("c", c)):
        torch.testing.assert_close(move(a, [found.first, found.second], found.places[label])["w"], point["w"])
    assert (found.first["w"] @ found.second["w"]).item() == pytest.approx(0, abs=1e-12)
    assert found.first["w"].norm() == pytest.approx(found.second["w"].norm())
    x, y = found.axes(7)
    assert x[0] < 0 < 1 < x[-1]
    assert y[0] < 0 < 2.5 < y[-1]


def test_plane_with_a_random_second_axis():
    a, b = vec(0.0, 0.0, 0.0), vec(2.0, 0.0, 0.0)
    found = plane(a, {"b": b}, names=["w"], label="a", other=vec(3.0, 4.0, 0.0))
    torch.testing.assert_close(found.second["w"], vec(0.0, 2.0, 0.0)["w"])
    x, y = found.axes(5)
    assert y[-1] - y[0] == pytest.approx(x[-1] - x[0]) == pytest.approx(1.6)
    assert found.axes(5, square=False)[1][-1] == pytest.approx(0.3)


def test_degenerate_planes_are_refused():
    a, b, c = vec(0.0, 0.0), vec(1.0, 1.0), vec(2.0, 2.0)
    with pytest.raises(SettingsError, match="one line"):
        plane(a, {"b": b, "c": c}, names=["w"], label="a", other={})
    with pytest.raises(SettingsError, match="same parameters"):
        plane(a, {"b": a}, names=["w"], label="a", other={})
    with pytest.raises(SettingsError, match="keep_checkpoints"):
        trajectory_plane(a, {"epoch 1": b, "epoch 2": c}, names=["w"], label="a")
    with pytest.raises(SettingsError, match="keep_checkpoints"):
        trajectory_plane(a, {}, names=["w"], label="a")


def test_trajectory_is_projected_on_its_principal_components():
    rng = np.random.default_rng(0)
    centre = rng.normal(size=40)
    offsets = rng.normal(size=(6, 40)) * np.array([5, 4, 3, 1, 0.5, 0.1])[:, None]
    steps = {f"epoch {i}": vec(*(centre + offset)) for i, offset in enumerate(offsets)}
    found = trajectory_plane(vec(*centre), steps, names=["w"], label="best")
    _, singular, right = np.linalg.svd(offsets, full_matrices=False)
    assert found.explained == pytest.approx(singular[:2] ** 2 / (singular**2).sum())
    for axis, expected in ((found.first, right[0]), (found.second, right[1])):
        assert abs(axis["w"].numpy() @ expected) == pytest.approx(1, rel=1e-9)
    for i, offset in enumerate(offsets):
        x, y = found.places[f"epoch {i}"]
        assert (x, y) == pytest.approx((offset @ found.first["w"].numpy(), offset @ found.second["w"].numpy()))
    assert found.places["best"] == (0.0, 0.0)


def test_buffers_move_along_with_the_parameters(settings, dataset):
    one, two = make_model(settings, dataset, 1), make_model(settings, dataset, 2)
    names = moving_names(one, group="all")
    buffers = buffers_of(one, names)
    assert len(buffers) == 8  # mean and variance of two batch norms in each of two tails
    assert all("running" in name for name in buffers)
    assert buffers_of(one, moving_names(one, group="fused_head")) == ()
    state = {n: one.state_dict()[n] for n in (*names, *buffers)}
    like = vector_of(state, state, label="one")
    end = vector_of(two.state_dict(), like, label="two")
    away = line(like, end, names=names, label="two")
    torch.testing.assert_close(move(like, [away], [1.0]), end)
    variance = next(n for n in buffers if n.endswith("running_var"))
    middle = move(like, [away], [0.5])[variance].exp()
    expected = (one.state_dict()[variance] * two.state_dict()[variance]).sqrt()
    torch.testing.assert_close(middle, expected)


def test_another_model_is_refused_by_name(settings, dataset, model):
    like = dict(model.state_dict())
    state = {**like, "fused_head.3.weight": torch.zeros(3, 5)}
    with pytest.raises(CheckpointError, match=r"fused_head\.3\.weight is \(3, 5\), not \(3, 7\)"):
        vector_of(state, like, label="x")
    del state["fused_head.3.weight"]
    with pytest.raises(CheckpointError, match="is missing"):
        vector_of(state, like, label="x")


@pytest.mark.parametrize("batch_norm", ["running", "recalibrated"])
def test_paths_and_planes_meet_the_checkpoints(tmp_path, batch_norm, monkeypatch):
    settings = make_settings(analyses=(), batch_norm=batch_norm)
    dataset = make_dataset(settings)
    erm, mbcd, third = (make_checkpoint(settings, dataset, seed=s) for s in (0, 1, 2))
    pairs = [("mbcd", mbcd), ("third", third)]
    result = command.landscape(settings, dataset, [("erm", erm)], output=tmp_path, towards=pairs)
    alone = command.landscape(settings, dataset, [("erm", erm), *pairs], output=tmp_path).figures.checkpoints
    for label in ("mbcd", "third"):
        path = result.figures.paths[f"erm to {label}"]
        assert path.from_loss == pytest.approx(alone["erm"].loss, rel=1e-5)
        assert path.to_loss == pytest.approx(alone[label].loss, rel=1e-5)
        assert path.barrier >= 0
    assert result.figures.plane.points == 25
    with pytest.raises(SettingsError, match="same parameters"):
        command.landscape(settings, dataset, [("erm", erm)], output=tmp_path, towards=[("copy", erm)])


def test_student_to_teacher(tmp_path, monkeypatch):
    settings = make_settings(analyses=(), weights="student", to_weights="teacher")
    dataset = make_dataset(settings)
    both = make_checkpoint(settings, dataset, teacher=True)
    result = command.landscape(settings, dataset, [("best", both)], output=tmp_path, towards=[("best", both)])
    assert list(result.figures.paths) == ["best (student) to best (teacher)"]


def test_one_group_and_trajectory_are_drawn(tmp_path):
    settings = make_settings(analyses=(), group="audio")
    dataset = make_dataset(settings)
    steps = [(e, make_checkpoint(settings, dataset, seed=e)) for e in (3, 1, 2)]
    result = command.landscape(
        settings, dataset, [("best", make_checkpoint(settings, dataset, seed=9))], output=tmp_path,
        epochs=steps, towards=[("other", steps[0][1])],
    )  # fmt: skip
    assert list(result.figures.trajectory.places) == ["epoch 1", "epoch 2", "epoch 3", "best"]
    for name in ("path", "plane", "trajectory"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    again = command.redraw(tmp_path)
    assert {k for k in again if "plot" in k} == {k for k in result.files if "plot" in k}


def test_symmetric_helper():
    np.testing.assert_allclose(np.linalg.eigvalsh(symmetric([3.0, 1.0, 2.0])), [1, 2, 3])
