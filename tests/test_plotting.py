"""Plots show names as they are written, whatever the user's matplotlib says."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest

from mbcd_cli import plotting
from mbcd_cli.evaluation.report import plots
from mbcd_cli.training import curves

NAMES = ["Ba$$in", "_lab", "漢字"]


def test_names_of_the_users_are_no_formulas(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (
            plots.plot_confusion(np.eye(3), NAMES, tmp_path / "c.png", title="a $x_"),
            plots.plot_map(np.eye(3)[:, :2], {"class": (np.arange(3), NAMES)}, tmp_path / "m.png", title="$"),
        ):
            assert path.stat().st_size
    assert plotting.legend_label("_lab") == " _lab"


def test_letters_that_matplotlibs_own_font_lacks_come_from_an_installed_one(monkeypatch):
    plotting._style.cache_clear()
    monkeypatch.setattr(plotting, "_SCRIPTS", ("No Such Font", "STIXGeneral"))
    figure, axes = plotting.figure()
    assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "STIXGeneral"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes.set_title("\u20dd, which STIX alone has")
        figure.canvas.draw()
    plotting._style.cache_clear()


def test_powers_and_panels_are_formulas(tmp_path):
    fig, axes = plotting.figure()
    axes.set_yscale("log")
    axes.plot([1, 2], [1e-3, 10], label="video: $r_k$")
    label = axes.legend().get_texts()[0]
    plotting.save(fig, tmp_path / "a.png", formulas={label.get_text()})
    assert label.get_parse_math()
    assert all(text.get_parse_math() for text in axes.get_yticklabels())
    assert not axes.title.get_parse_math()


def test_a_panel_above_an_empty_place_has_tick_labels():
    for count in (1, 2, 3, 4, 5, 6, 8):
        fig, panels = plotting.panels(count, 3, lambda rows, columns: (9, 3 * rows), sharex=True, sharey=True)
        fig.canvas.draw()
        labelled = [any(label.get_visible() for label in axes.get_xticklabels()) for axes in panels]
        columns = min(count, 3)
        assert labelled == [at + columns >= count for at in range(count)], count
        assert fig.axes == panels
    fig, panels = plotting.panels(4, 3, lambda rows, columns: (9, 3 * rows), subplot_kw={"projection": "3d"})
    fig.canvas.draw()
    assert fig.axes == panels


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_notebooks_backend_and_settings_are_not_inherited(tmp_path, backend):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\n")
    code = (
        "import sys; sys.argv = ['mbcd', '--version']\n"
        "from mbcd_cli.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "import matplotlib; from mbcd_cli import plotting; plotting.figure()\n"
        "assert not matplotlib.rcParams['text.usetex'] and matplotlib.rcParams['font.size'] == 10"
    )
    environ = {**os.environ, "MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path), "COLUMNS": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mbcd ")


def test_records_cut_short_by_an_epochs_end_are_joined():
    """Means over as many steps each, weighted by them: nothing jumps where an epoch ends."""
    records = [
        {"step": step, "epoch": epoch, "steps": steps, "total": total, "modalities": {"a": {"p": total / 10}}}
        for step, epoch, steps, total in ((10, 1, 10, 5.0), (14, 1, 4, 1.0), (20, 2, 6, 2.0), (28, 2, 8, 3.0))
    ]
    evened = curves._evened(records)
    assert [(record["step"], record["steps"]) for record in evened] == [(10, 10), (20, 10), (28, 8)]
    assert evened[1]["total"] == pytest.approx(1.6)
    assert evened[1]["modalities"]["a"]["p"] == pytest.approx(0.16)
