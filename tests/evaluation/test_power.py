"""`mbcd power`: figures by hand, from tables, from a cache, from runs."""

from __future__ import annotations

import numpy as np
import pytest
from commands import run
from scipy import stats
from test_claims import SIZE, three_methods

from mbcd_cli.errors import SettingsError
from mbcd_cli.evaluation import power as p

ASSUMED = p.Assumptions(agreement=0.8, seed_agreement=0.9, seed_spread=0.02, icc=0.0)


def smallest(**changed):
    sizes = changed.pop("sizes", [np.ones(400, int)])
    assumed = p.Assumptions(**{**{f: getattr(ASSUMED, f) for f in p.Assumptions.__slots__}, **changed})
    return p._of_targets("t", sizes, assumed, (1, 3, 30), 1).smallest


def test_endless_seeds_leave_the_clips_alone_by_hand():
    """What lasts over seeds differs on 0.9 - 0.8 of the clips."""
    error = np.sqrt(0.1 / 400)
    wanted = error * (stats.norm.isf(0.025) + stats.norm.ppf(0.8))
    assert smallest()["inf"] == pytest.approx(wanted, rel=0.01)
    assert smallest()["1"] is None


def test_what_helps_and_what_does_not():
    few = smallest(sizes=[np.full(6, 70)], icc=0.05)
    assert few["inf"] > smallest(sizes=[np.full(42, 10)], icc=0.05)["inf"] > smallest(sizes=[np.ones(420)])["inf"]
    assert smallest()["3"] > smallest()["30"] > smallest()["inf"]
    assert smallest(seed_spread=0.04)["3"] > smallest()["3"]
    assert smallest(sizes=[np.ones(400)] * 4)["inf"] == pytest.approx(smallest()["inf"] / 2, rel=0.01)
    assert smallest(sizes=[np.array([400])])["inf"] is None


def test_where_two_methods_are_as_alike_as_two_seeds_nothing_is_the_limit():
    told = p._of_targets("t", [np.ones(400, int)], p.Assumptions(0.9, 0.9, 0.02, 0.0), p.COUNTS, 1)
    assert told.smallest["inf"] == pytest.approx(0, abs=1e-6)
    assert "the test set sets no limit: two methods agree" in p._verdict(told, 3)
    told = p._of_targets("t", [np.ones(400, int)], ASSUMED, p.COUNTS, 1)
    assert "until the test set is the limit (4.4 points)" in p._verdict(told, 3)


def test_a_study_of_that_difference_is_mostly_a_find():
    """Against the simulated studies: power as foretold when the assumptions are those that the studies are made by."""
    from power_simulation import Design, Effects, simulate

    design, effects, better = Design("d", ((8,) * 25,) * 3, 6), Effects("e", 0.08, 0.3, 0.0), 0.3
    found = list(simulate(design, effects, 500, better=better))
    spread = np.mean([d.variance for d, _, _ in found])
    freedom = np.median([d.freedom for d, _, _ in found])
    wanted = stats.nct.sf(stats.t.isf(0.025, freedom), freedom, np.mean([t for _, t, _ in found]) / np.sqrt(spread))
    assert np.mean([d.p < 0.05 for d, _, _ in found]) == pytest.approx(wanted, abs=0.06)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The manifest of 48 clips in 6 recordings, below a folder `d` of the one that commands run in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    values = np.random.default_rng(0).normal(size=(48, 4))
    np.save(tmp_path / "d" / "values.npy", values.astype(np.float32))
    rows = [f"c{i},{'ab'[i % 2]},{'train' if i < 8 else 'test'},{i % 3},values.npy#{i},r{i // 8}\n" for i in range(48)]
    table = tmp_path / "d" / "manifest.csv"
    table.write_text("id,domain,split,label,sound,group\n" + "".join(rows))
    return table


def test_of_tables_of_a_cache_and_of_runs(table, tmp_path):
    none = ("power", "--preset", "none", "--json")
    listed = run(*none, "--root", "d").data
    assert [(row["target"], row["clips"], row["recordings"]) for row in listed["targets"]] == [
        ("a", 20, 5),
        ("b", 20, 5),
        ("average", 40, 10),
    ]
    assert listed["targets"][0]["smallest"]["1"] is None
    prepare = ("prepare", "manifest", "--root", "d", "--preset", "none")
    run(*prepare)
    assert run(*none, "--dataset", "d").data == listed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/d/*/shard-*.h5")}
    table.write_text(table.read_text().replace(",r1\n", ",r2\n"))
    run(*prepare)
    again = run(*none, "--dataset", "d").data
    assert [row["recordings"] for row in again["targets"]] == [4, 4, 8], "another `group` is in the cache"
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/d/*/shard-*.h5")}
    three_methods(tmp_path / "runs", recordings=np.arange(SIZE) // 10)
    measured = run(*none, "--dataset", "d", "--runs", "runs/*", "--icc", "0.1").data
    assert measured["assumptions"]["icc"] == 0.1
    folders = sorted(map(str, (tmp_path / "runs").iterdir()))  # what a shell makes of a pattern that is not quoted
    assert run(*none, "--dataset", "d", "--runs", *folders, "--icc", "0.1").data == measured
    assert "measured on runs: agreement, seed agreement, seed spread, icc" in measured["basis"]
    assert 0 < measured["assumptions"]["agreement"] <= measured["assumptions"]["seed_agreement"] < 1
    assert "each of 6 at 5 % / 6 (Holm)" in run(*none[:-1], "--dataset", "d", "--methods", "4").stdout


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--icc", "2"), 1, "--icc 2 is no share"),
        (("--agreement", "0.9", "--seed-agreement", "0.8"), 1, "less than two methods"),
        (("--seeds", "many"), 2, "--seeds many: nothing to train"),
        (("--accuracy", "60"), 2, "--accuracy 60 is no share"),
        (("--methods", "1"), 1, "nothing to compare"),
        (("--targets", "moon"), 1, "moon"),
        (("--runs", "nowhere/*"), 1, "There is no run at nowhere/*"),
        (("runs/a",), 2, "runs/a: there is no option before it"),
    ],
)
def test_wrong_questions(table, args, code, says):
    assert says in run("power", "--preset", "none", "--root", "d", *args, code=code).stderr


def test_no_assumption_out_of_range():
    with pytest.raises(SettingsError, match="no share"):
        p.Assumptions(0.5, 0.6, -0.1, 0.0)
