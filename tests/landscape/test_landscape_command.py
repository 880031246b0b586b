from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import torch
from landscape_cases import make_checkpoint, make_dataset, make_settings

from mbcd_cli import plotting
from mbcd_cli.cli.landscape import show_landscape
from mbcd_cli.errors import CheckpointError, MbcdError, SettingsError
from mbcd_cli.files import read_json
from mbcd_cli.json_values import json_values
from mbcd_cli.landscape import drawing
from mbcd_cli.landscape import measure as command
from mbcd_cli.landscape.drawing import with_error
from mbcd_cli.landscape.objective import ModelObjective
from mbcd_cli.landscape.store import GridStore, StoreError, axis, read_grid
from mbcd_cli.say import Say

EVERYTHING = ("surface", "curve", "flatness", "worst_case")


def run(tmp_path, checkpoints=None, *, dataset=None, overwrite=False, **chosen):
    settings = make_settings(**chosen)
    dataset = dataset or make_dataset(settings)
    checkpoints = checkpoints or [("best", make_checkpoint(settings, dataset))]
    return command.landscape(settings, dataset, checkpoints, output=tmp_path / "land", overwrite=overwrite)


def test_measures_and_draws(tmp_path, capsys):
    result = run(tmp_path, analyses=EVERYTHING, ascent_steps=3)
    best = result.figures.checkpoints["best"]
    stored = read_json(tmp_path / "land" / "landscape.json")
    assert stored["checkpoints"]["best"] == json_values(best)
    assert "curvature" not in stored["checkpoints"]["best"], "what was not asked for has no key"
    assert best.surface.points == 25
    assert best.curve.points == 19
    assert best.flatness.directions == [3, 3, 3]
    assert best.flatness.mean_increase[0] == 0
    assert best.worst_case.increase[-1] > best.flatness.mean_increase[-1]
    for path in result.files.values():
        assert path.stat().st_size > 1000
    surface = read_grid(tmp_path / "land" / "surface-best.h5")
    assert surface.loss[2, 2] == pytest.approx(best.loss, rel=1e-6)
    # the curve is the surface's middle row
    curve = read_grid(tmp_path / "land" / "curve-best.h5")
    assert curve.loss[0, 9] == pytest.approx(best.loss, rel=1e-6)
    assert curve.loss[0, 0] == pytest.approx(surface.loss[2, 0], rel=1e-6)
    show_landscape(result)
    assert "best" in capsys.readouterr().out


def test_the_summary_tells_of_what_its_command_wrote(tmp_path):
    """Another landscape may be at work in the folder: its files change, and go, after this one has ended."""
    others = ("surface-other.h5", "surface-other.h5.journal-0", ".surface-other.h5.partial")
    (tmp_path / "land").mkdir()
    for name in others:
        (tmp_path / "land" / name).write_bytes(b"half of it")
    for analyses, wrote in ((), set()), (("curve",), {"curve-best.h5", "curve.png"}):
        run(tmp_path, analyses=analyses)
        assert set(read_json(tmp_path / "land" / "landscape.json")["files"]) == wrote


def test_same_seed_same_values_and_other_seed_others(tmp_path):
    one = run(tmp_path / "a", analyses=("surface",))
    two = run(tmp_path / "b", analyses=("surface",))
    other = run(tmp_path / "c", analyses=("surface",), seed=1)
    increases = [result.figures.checkpoints["best"].surface.max_increase for result in (one, two, other)]
    assert increases[0] == increases[1] != increases[2]


def test_a_second_run_measures_nothing_anew(tmp_path, monkeypatch):
    first = run(tmp_path, analyses=EVERYTHING, ascent_steps=2)
    calls = []
    original = ModelObjective.measure
    monkeypatch.setattr(ModelObjective, "measure", lambda *a: calls.append(1) or original(*a))
    again = run(tmp_path, analyses=EVERYTHING, ascent_steps=2)
    assert len(calls) == 1  # the centre
    assert again.figures.checkpoints == first.figures.checkpoints
    with pytest.raises(StoreError, match=r"seed: 0 in the file, 3 now"):
        run(tmp_path, analyses=EVERYTHING, seed=3)
    run(tmp_path, analyses=EVERYTHING, ascent_steps=2, seed=3, overwrite=True)


def test_teacher_is_deployed(tmp_path):
    settings = make_settings()
    dataset = make_dataset(settings)
    checkpoint = make_checkpoint(settings, dataset, teacher=True)
    losses = {
        weights: run(tmp_path / weights, [("best", checkpoint)], weights=weights, analyses=())
        .figures.checkpoints["best"]
        .loss
        for weights in ("deployed", "teacher", "student")
    }
    assert losses["deployed"] == losses["teacher"] != losses["student"]
    with pytest.raises(SettingsError, match="no teacher"):
        run(tmp_path, weights="teacher", analyses=())


@pytest.mark.parametrize("data", ["validation", "target", "train"])
def test_clips(tmp_path, data):
    settings = make_settings()
    dataset = make_dataset(settings)
    expected = {
        "validation": (dataset.domain != 2) & (dataset.split == 1),
        "target": (dataset.domain == 2) & (dataset.split == 1),
        "train": (dataset.domain != 2) & (dataset.split == 0),
    }[data]
    assert run(tmp_path, data=data, analyses=()).figures.data.clips == expected.sum()
    assert run(tmp_path, data=data, analyses=(), max_clips=4).figures.data.clips == 4
    assert run(tmp_path, data=data, analyses=(), max_clips=0).figures.data.clips == expected.sum()


def test_a_student_and_its_own_teacher_have_names_of_their_own(tmp_path):
    settings = make_settings(weights="student", to_weights="teacher", analyses=())
    dataset = make_dataset(settings)
    pair = [(label, make_checkpoint(settings, dataset, teacher=True)) for label in ("best", "best'")]
    result = command.landscape(settings, dataset, pair[:1], towards=pair[1:], output=tmp_path)
    assert list(result.figures.paths) == ["best (student) to best (teacher)"]


def test_checkpoints_of_other_targets_are_told_and_those_of_other_datasets_refused(tmp_path):
    settings = make_settings(analyses=())
    dataset = make_dataset(settings)
    said = []

    def measured(part, **changed):
        other = settings.model_copy(update={part: getattr(settings, part).model_copy(update=changed)})
        checkpoints = [("a", make_checkpoint(settings, dataset)), ("b", make_checkpoint(other, dataset))]
        return command.landscape(settings, dataset, checkpoints, output=tmp_path, say=Say(said.append))

    measured("training", target_domain="tilted")
    assert "b was trained for target tilted" in said[0]
    with pytest.raises(CheckpointError, match="b was trained on dataset other"):
        measured("dataset", name="other")


def test_figures_with_their_errors():
    assert with_error(250.4, 12.3) == "250 ± 12"
    assert with_error(3.14159, 0.0123) == "3.142 ± 0.012"
    assert with_error(2.5, float("nan")) == "2.5"


def test_errors_name_the_remedy(tmp_path):
    with pytest.raises(SettingsError, match=r"group(.|\n)*video"):
        run(tmp_path, group="smell")
    settings = make_settings()
    dataset = make_dataset(settings)
    dataset.split[:] = 0
    with pytest.raises(MbcdError):
        run(tmp_path, dataset=dataset)
    with pytest.raises(SettingsError, match="plot-only"):
        command.redraw(tmp_path / "land")


def test_one_batch_and_recalibration(tmp_path):
    result = run(tmp_path, max_clips=2, batch_norm="recalibrated", analyses=("curve",), points=3)
    assert result.figures.checkpoints["best"].curve.missing == 0


def test_several_checkpoints_in_one_figure_redrawn_from_files(tmp_path):
    settings = make_settings()
    dataset = make_dataset(settings)
    pairs = [("erm/best", make_checkpoint(settings, dataset)), ("mbcd", make_checkpoint(settings, dataset, seed=7))]
    result = run(tmp_path, pairs, analyses=("surface", "curve", "flatness"))
    pictures = sorted((tmp_path / "land").glob("*.png"))
    before = [p.read_bytes() for p in pictures]
    for picture in pictures:
        picture.unlink()
    again = command.redraw(tmp_path / "land")
    assert again == {name: path for name, path in result.files.items() if name != "summary"}
    assert [p.read_bytes() for p in pictures] == before


def test_holes_are_drawn_and_counted(tmp_path):
    path = tmp_path / "surface.h5"
    with GridStore(path, x=axis(1, 9), y=axis(1, 9), identity={}, marks={"best": (0.0, 0.0)}) as store:
        for row, column in store.missing():
            value = float(row * row + column + 1)
            if row < 6:
                store.record(row, column, np.nan if (row, column) == (2, 3) else value, 0.5)
    titles = []
    original = drawing.plotting.save
    drawing.plotting.save = lambda fig, path, **_: titles.extend(a.get_title() for a in fig.axes) or original(fig, path)
    try:
        drawing.plot_surfaces({"best": path}, tmp_path / "s.png")
        drawing.plot_surfaces_3d({"best": path}, tmp_path / "t.png")
    finally:
        drawing.plotting.save = original
    wanted = "best\n(1 points without a finite loss, 27 not computed)"
    assert titles.count(wanted) == 2


def test_a_surface_with_no_finite_value_is_still_drawn(tmp_path):
    path = tmp_path / "surface.h5"
    with GridStore(path, x=axis(1, 3), y=axis(1, 3), identity={}, about={"centre_loss": 1.0}) as store:
        for row, column in store.missing():
            store.record(row, column, np.inf, 0.5)
    drawing.plot_surfaces({"best": path}, tmp_path / "s.png")
    drawing.plot_surfaces_3d({"best": path}, tmp_path / "t.png")
    drawing.plot_curves({"best": path}, tmp_path / "c.png")
    drawing.plot_flatness({"best": path}, tmp_path / "f.png")


def test_weights_that_overflow_leave_holes_not_errors(tmp_path):
    settings = make_settings()
    dataset = make_dataset(settings)
    checkpoint = make_checkpoint(settings, dataset)
    checkpoint.student["fused_head.3.weight"].fill_(3e38)
    result = run(tmp_path, [("best", checkpoint)], analyses=EVERYTHING, ascent_steps=2)
    assert result.figures.checkpoints["best"].surface.non_finite > 0


def test_file_format(tmp_path):
    run(tmp_path, analyses=("surface",))
    with h5py.File(tmp_path / "land" / "surface-best.h5") as file:
        assert json.loads(file.attrs["identity"])["group"] == "all"
        assert file["computed"][()].all()
    assert torch.is_grad_enabled()


def test_curvature(tmp_path):
    chosen = {
        "analyses": ("curvature",),
        "group": "fused_head",
        "eigenvalues": 3,
        "trace_probes": 200,
        "density_steps": 20,
    }
    estimate = run(tmp_path / "a", **chosen).figures.checkpoints["best"].curvature
    precise = run(tmp_path / "b", **chosen, exact_limit=5000, curvature_dtype="float64")
    exact = precise.figures.checkpoints["best"].curvature
    assert exact.exact
    assert not estimate.exact
    assert estimate.converged == [True] * 3
    assert estimate.eigenvalues == pytest.approx(exact.eigenvalues, rel=2e-3)
    assert abs(estimate.trace - exact.trace) < 4 * estimate.trace_error
    assert estimate.parameters == exact.parameters == 16 * 7 + 7 + 7 * 3 + 3
    # a finished file is used as it is, unless it is of something else
    assert run(tmp_path / "a", **chosen).figures.checkpoints["best"].curvature == estimate
    with pytest.raises(StoreError, match="eigenvalues: 3 in the file, 2 now"):
        run(tmp_path / "a", **{**chosen, "eigenvalues": 2})


def test_spectra_are_drawn(tmp_path, monkeypatch):
    figures, save = [], plotting.save
    monkeypatch.setattr(plotting, "save", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    result = run(tmp_path, analyses=("curvature",), density_steps=10, trace_probes=3)
    assert (tmp_path / "land" / "spectrum.png").stat().st_size > 1000
    assert result.files["spectrum plot"].name == "spectrum.png"
    (axes,) = (figure.axes[0] for figure in figures if "Spectral" in figure.axes[0].get_title())
    peak = max(float(max(line.get_ydata(), default=0)) for line in axes.lines if len(line.get_ydata()) > 9)
    assert peak < axes.get_ylim()[1] < 30 * peak
    assert "width" in axes.get_ylabel()
