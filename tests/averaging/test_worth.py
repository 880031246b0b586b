"""What an average is worth over another, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import memory_settings

from mbcd_cli import plotting
from mbcd_cli.averaging.study import kinds_of
from mbcd_cli.averaging.study_plot import plot_study
from mbcd_cli.averaging.worth import TRAINED, Worth, gain, summarised
from mbcd_cli.settings.sources import to_toml


def worth(average, domain, seed, target):
    figures = {"source": 90.0, "increase": 0.1, "worst": 1.0}
    return Worth(average=average, method="erm", domain=domain, seed=seed, target=target, **figures)


TRAININGS = [worth(TRAINED, d, s, t) for d, s, t in [("a", 0, 50), ("b", 0, 70), ("a", 1, 54), ("b", 1, 72)]]


def test_a_gain_is_over_the_same_target_and_seed_as_trained():
    """Seed 0: +4 and +2, so 3; seed 1: +1 and -1, so 0."""
    better = [worth("better", d, s, t) for d, s, t in [("a", 0, 54), ("b", 0, 72), ("a", 1, 55), ("b", 1, 71)]]
    found = gain([*TRAININGS, *better], "better")
    assert found.value == pytest.approx(1.5)
    assert found.variance == pytest.approx(4.5 / 2)
    assert found.freedom == 1
    assert gain([*TRAININGS, *better], TRAINED) is None
    same = [replace(one, average="same") for one in TRAININGS]  # by chance, or nearly the same weights
    assert (gain([*TRAININGS, *same], "same").value, gain([*TRAININGS, *same], "same").freedom) == (0, 0)


def test_a_soup_is_compared_with_the_mean_of_its_runs():
    """+3 over the mean of 50 and 54, +1 over that of 70 and 72; no interval."""
    soups = [worth("soup", "a", None, 55), worth("soup", "b", None, 72)]
    found = gain([*TRAININGS, *soups], "soup")
    assert (found.value, found.freedom) == (pytest.approx(2.0), 0)


@pytest.mark.parametrize("increase", [0.1, -0.1])
def test_a_loss_that_falls_is_in_the_figure(increase, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plotting, "save", lambda figure, path: shown.append(figure.axes[1].get_xlim()) or path)
    plot_study(summarised([replace(one, increase=increase) for one in TRAININGS]), tmp_path / "study.png")
    ((left, right),) = shown
    assert left == 0 if increase > 0 else left < increase < right


def test_runs_of_several_datasets_and_modalities_are_not_averaged_and_repeats_count_once(tmp_path):
    def run(name, dataset="one", **changes):
        settings = memory_settings(dataset={"name": dataset}, **changes)
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.toml").write_text(to_toml(settings, stamped=True))
        return tmp_path / name

    first, copied = run("first"), run("second")
    warm = run("warm", optimizer={"lr": 0.5})
    names, (repeats, kinds) = kinds_of([first, copied, warm])
    assert names == {first: "mbcd", warm: "mbcd"}
    assert "second repeats" in repeats
    assert kinds == "mbcd: means are over runs of 2 kinds (mbcd (lr 0.01); mbcd (lr 0.5))."
    others = run("other", "two"), run("alone", names=("left",))
    names, warnings = kinds_of([first, *others])
    assert [*names.values()] == [
        "mbcd (one, left, multi-source)",
        "mbcd (one, left+right, multi-source)",
        "mbcd (two, left+right, multi-source)",
    ]
    assert warnings == []
