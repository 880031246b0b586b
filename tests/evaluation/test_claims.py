"""Differences of two methods: against scipy, against brute force, and over simulated studies."""

from __future__ import annotations

import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mbcd_cli.evaluation import claims as c
from mbcd_cli.evaluation.report import claim_tables, evaluated, plots
from mbcd_cli.evaluation.report.comparison import compare_runs
from mbcd_cli.evaluation.report.export import OUTCOMES
from mbcd_cli.files import written_hdf5

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from power_simulation import Design, Effects, bootstrap, simulate
from test_compare import write_run


def outcomes(rng, seeds, sizes):
    recordings = np.repeat(np.arange(len(sizes)), sizes)
    return c.TargetOutcomes(rng.integers(-1, 2, (seeds, len(recordings))), rng.permutation(len(sizes))[recordings])


def test_seeds_that_agree_leave_the_t_test_over_clips_or_over_recordings():
    rng = np.random.default_rng(0)
    row = rng.integers(-1, 2, 60)
    alone = c.method_difference([c.TargetOutcomes(np.tile(row, (3, 1)), np.arange(60))])
    theirs = stats.ttest_1samp(row, 0)
    assert alone.p == pytest.approx(theirs.pvalue)
    assert alone.interval() == pytest.approx(theirs.confidence_interval())
    of_ten = c.method_difference([c.TargetOutcomes(np.tile(row, (3, 1)), np.repeat(np.arange(6), 10))])
    theirs = stats.ttest_1samp(row.reshape(6, 10).mean(axis=1), 0)
    assert (of_ten.p, of_ten.freedom) == pytest.approx((theirs.pvalue, 5))


def test_clips_that_agree_leave_the_t_test_over_seeds():
    means = np.array([0.5, 0.25, -0.25, 0.25])
    values = np.where(np.arange(100)[None] < 100 * np.abs(means)[:, None], np.sign(means)[:, None], 0)
    found = c.method_difference([c.TargetOutcomes(np.repeat(values.mean(axis=1)[:, None], 50, axis=1), np.arange(50))])
    theirs = stats.ttest_1samp(means, 0)
    assert (found.p, found.freedom) == pytest.approx((theirs.pvalue, 3))


@pytest.mark.parametrize("sizes", [(7,) * 5, (1,) * 30])
def test_variance_is_that_of_the_two_way_analysis(sizes):
    """(MS of recordings + MS of seeds - MS of both) / (S G), where all recordings have as many clips."""
    rng = np.random.default_rng(1)
    target = outcomes(rng, 4, sizes)
    target.differences[0] += 2  # so that seeds are more than chance, and recordings too
    target.differences[:, target.recordings == 0] += 2
    cells = np.stack([target.differences[:, target.recordings == g].mean(axis=1) for g in range(len(sizes))], axis=1)
    seeds, groups = cells.shape
    rows, columns = cells.mean(axis=1, keepdims=True), cells.mean(axis=0, keepdims=True)
    rest = ((cells - rows - columns + cells.mean()) ** 2).sum() / (seeds - 1) / (groups - 1)
    of_seeds, of_groups = groups * rows.var(ddof=1), seeds * columns.var(ddof=1)
    assert c.method_difference([target]).variance == pytest.approx((of_groups + of_seeds - rest) / (seeds * groups))


def test_degrees_of_freedom_are_no_fewer_than_those_of_either_part():
    assert c.variance_of([1.0], [4.0], 1.0, 1.0, 2) == (1.0, 2)  # all of the variance is in both, and counts twice


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_hold_whatever_share_of_the_variance_comes_of_seeds(seeds):
    """Of normal effects and endlessly many clips: B is known, I is 1, W times (S - 1) is (1 + rho) chi-squared.

    Satterthwaite's rule for B and W - I, made unbiased, covers 90 % where B is 1 and rho is 2.
    """
    drawn = stats.chi2.ppf((np.arange(400) + 0.5) / 400, seeds - 1) / (seeds - 1)
    for between, rho in product((1.0, 1.5, 3.0, 10.0), (0.0, 0.5, 2.0, 8.0, 32.0)):
        halves = [
            c.Difference(0, *c.variance_of([between], [c.MOST], 1.0, (1 + rho) * w, seeds - 1)).interval()[1]
            for w in drawn
        ]
        covered = 2 * stats.norm.cdf(np.array(halves) / np.sqrt(between + rho)) - 1
        assert 0.94 <= covered.mean() <= 0.965, (between, rho)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=8), st.floats(0, 1))
def test_variance_and_freedom_against_whole_matrices(sizes, correlation):
    sizes = np.array(sizes)
    share = sizes / sizes.sum()
    own = np.diag(correlation + (1 - correlation) / sizes)
    residual = np.eye(len(sizes)) - share[None]
    of_residuals = residual @ own @ residual.T
    product = np.diag(share**2) @ of_residuals
    whole, factor, freedom = c.recordings_variance(sizes, correlation)
    assert whole == pytest.approx(share @ own @ share)
    assert factor * np.trace(product) == pytest.approx(whole)
    assert freedom == pytest.approx(np.trace(product) ** 2 / np.trace(product @ product))


def test_correlation_within_goes_with_the_f_of_one_way_analysis():
    rng = np.random.default_rng(2)
    groups = [rng.normal(rng.normal(), 1, size) for size in (5, 9, 20, 7)]
    values, sizes = np.concatenate(groups), np.array([len(group) for group in groups])
    f = stats.f_oneway(*groups).statistic
    typical = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / 3
    found = c.correlation_within(values, np.repeat(np.arange(4), sizes), sizes)
    assert found == pytest.approx((f - 1) / (f + typical - 1))


def test_which_method_comes_first_and_the_order_of_clips_do_not_matter():
    rng = np.random.default_rng(3)
    targets = [outcomes(rng, 3, (9, 4, 20)), outcomes(rng, 3, (30, 3))]
    one = c.method_difference(targets)
    other = c.method_difference([c.TargetOutcomes(-t.differences[::-1, ::-1], t.recordings[::-1]) for t in targets])
    assert (one.value, one.variance, one.freedom) == pytest.approx((-other.value, other.variance, other.freedom))
    assert one.probability == pytest.approx(1 - other.probability)


def test_nothing_differs():
    found = c.method_difference([c.TargetOutcomes(np.zeros((3, 10)), np.arange(10))])
    assert (found.value, found.p, found.probability, found.interval()) == (0, 1, 0.5, (0, 0))


def test_seeds_that_come_out_alike_by_chance_prove_nothing():
    """Each seed gets one more clip right, another one: their mean has no variance, and V was 0, p 0."""
    rest = np.eye(3, 50) - np.eye(3, 50).mean(axis=0)  # of the two-way analysis, rows being alike
    found = c.method_difference([c.TargetOutcomes(np.eye(3, 50), np.arange(50))])
    assert found.value == pytest.approx(1 / 50)
    assert found.variance == pytest.approx((rest**2).sum() / 2 / 49 / 150)
    assert found.p > 0.05


@pytest.mark.parametrize(("freedom", "alpha"), [(2.0, 0.05), (7.5, 0.05 / 3), (1e6, 0.05)])
def test_smallest_difference_is_found_four_times_in_five(freedom, alpha):
    rng = np.random.default_rng(4)
    smallest = c.smallest_difference(0.01, freedom, alpha)
    studies = (smallest / 0.1 + rng.normal(size=100_000)) / np.sqrt(rng.chisquare(freedom, 100_000) / freedom)
    assert (np.abs(studies) > stats.t.isf(alpha / 2, freedom)).mean() == pytest.approx(0.8, abs=0.005)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing_with_bonferroni(p):
    """A claim stands if every set of claims that it is in holds one that stands by Bonferroni."""
    sets = [held for size in range(1, len(p) + 1) for held in combinations(range(len(p)), size)]
    for index, found in enumerate(c.holm(p)):
        worst = max(len(held) * min(p[i] for i in held) for held in sets if index in held)
        assert found == pytest.approx(min(worst, 1))


def test_critical_differences_are_demsars():
    """Table 5a of Demsar (2006): q at 0.05 for 2 to 10 classifiers."""
    quantiles = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    for methods, quantile in enumerate(quantiles, start=2):
        wanted = quantile * np.sqrt(methods * (methods + 1) / (6 * 14))
        assert c.critical_difference(methods, 14) == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize(
    ("design", "effects"),
    [
        (Design("few recordings", ((40, 25, 20, 10, 5),) * 3, 3), Effects("both", 0.1, 0.3)),
        (Design("clips", ((1,) * 100,) * 3, 3), Effects("seeds", 0.15, 0.0)),
        (Design("more seeds", ((1,) * 100,) * 2, 8), Effects("small", 0.06, 0.1)),
    ],
    ids=lambda value: value.name,
)
def test_intervals_hold_the_truth_in_simulated_studies(design, effects):
    """95 % of 600 is 570, give or take 11 (two standard errors); `power_simulation.py` looks closer."""
    held = [low <= truth <= high for e, truth, _ in simulate(design, effects, 600) for low, high in [e.interval()]]
    assert 0.93 <= np.mean(held) <= 0.98


def test_new_domains_are_a_sample():
    """Methods suit domains differently: the interval for all domains holds their mean, that for these does not."""
    rng, held, narrow = np.random.default_rng(5), [], []
    for _ in range(400):
        suits = rng.normal(0, 0.2, 4)
        right = [rng.random((4, 3, 150)) < 0.5 + suits[:, None, None] / 2, rng.random((4, 3, 150)) < 0.5]
        targets = [c.TargetOutcomes(right[0][t].astype(int) - right[1][t], np.arange(150)) for t in range(4)]
        for kept, found in ((held, c.in_new_domains(targets)), (narrow, c.method_difference(targets))):
            low, high = found.interval()
            kept.append(low <= 0 <= high)
    assert 0.92 <= np.mean(held) <= 0.98
    assert np.mean(narrow) < 0.8


def test_the_bootstraps_variance_is_the_models_but_for_its_bias():
    """Owen (2007): drawing both seeds and recordings anew counts what is in both once more, and divides by n."""
    rng = np.random.default_rng(6)
    target = outcomes(rng, 50, (4,) * 80)
    assert bootstrap([target], rng, 4000).var() == pytest.approx(
        c.method_difference([target]).variance + 2 * c._measured(target).mixed, rel=0.1
    )


SIZE = 60


def write_tested(root, method, target, seed, *, right, recordings=range(SIZE), digest="d"):
    """A run whose outcomes are kept: the first `right` clips, moved by the seed."""
    others = [name for name in ("studio", "street", "tilted") if name != target]
    correct = np.roll(np.arange(SIZE) < right, 3 * seed)
    run = write_run(
        root, dataset="d", modalities=["video"], method=method, target=target, sources=others, seed=seed,
        top1=100 * correct.mean(),
    )  # fmt: skip
    with written_hdf5(run / OUTCOMES) as file:
        file.attrs["digest"] = digest
        file["correct"], file["recordings"] = correct, np.array(recordings, np.int32)
    return run


def claims_of(root):
    (table,) = claim_tables.claim_tables([evaluated.load_run(run) for run in evaluated.find_runs([f"{root}/*"])[0]])
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}, table.note


def three_methods(root, seeds=4, **how):
    for target in ("studio", "street", "tilted"):
        for seed in range(seeds):
            for method, right in {"erm": 20, "ema": 20 + (-1) ** seed, "mbcd": 40}.items():
                write_tested(root, method, target, seed, right=right + (seed * len(target)) % 3, **how)


def test_claims_of_runs(tmp_path):
    three_methods(tmp_path)
    rows, note = claims_of(tmp_path)
    assert [row["verdict"] for row in rows.values()] == ["not told apart", "mbcd is better", "mbcd is better"]
    assert rows["ema - erm"]["points"] == "+0.00"
    assert rows["mbcd - erm"]["points"] == "+33.33"
    assert float(rows["ema - erm"]["Holm"]) >= float(rows["ema - erm"]["p"])
    assert "street 60 clips of 60 recordings" in note
    assert "each clip is one by itself" in note
    wide = tmp_path / "wide"
    three_methods(wide, recordings=np.arange(SIZE) // 15)
    grouped, note = claims_of(wide)
    assert float(grouped["mbcd - erm"]["least seen"]) > float(rows["mbcd - erm"]["least seen"])
    assert "4 recordings" in note
    assert "by itself" not in note


def test_the_same_outcomes_are_no_proof_of_no_difference(tmp_path):
    for seed in range(3):
        for method in ("erm", "ema"):
            write_tested(tmp_path, method, "street", seed, right=60)
    (row,) = claims_of(tmp_path)[0].values()
    assert (row["points"], row["95 %"], row["least seen"], row["verdict"]) == ("+0.00", "-", "-", "not told apart")


@pytest.mark.parametrize(
    ("seeds", "how", "why"),
    [
        (2, {}, "2 seeds"),
        (1, {}, "1 seed"),
        (3, {"recordings": [7] * SIZE}, "1 recordings of street"),
    ],
)
def test_what_cannot_be_told_is_said(tmp_path, seeds, how, why):
    three_methods(tmp_path, seeds=seeds, **how)
    row = claims_of(tmp_path)[0]["mbcd - erm"]
    assert row["verdict"].startswith(f"cannot be told: {why}")
    assert row["points"] == "+33.33"
    assert row["p"] == "-"


def test_runs_that_cannot_be_paired(tmp_path):
    for seed in range(3):
        for method, digest in {"erm": "d", "ema": "d", "mbcd": "other"}.items():
            run = write_tested(tmp_path, method, "street", seed, right=20, digest=digest)
            if method == "ema":
                (run / OUTCOMES).write_bytes(b"no HDF5")
    rows, note = claims_of(tmp_path)
    assert rows["mbcd - erm"]["verdict"] == "cannot be told: tested on different clips"
    assert rows["ema - erm"]["verdict"] == "cannot be told: no seed of both"
    assert "cannot be read" in note
    assert "mbcd evaluate --run" in note


def test_rows_of_other_targets_and_seeds_are_counted_and_not_paired(tmp_path):
    """As a search leaves them: a configuration for every target."""
    for method, target in {"erm": "studio", "ema": "studio", "mbcd": "street"}.items():
        write_tested(tmp_path, method, target, 0, right=20)
    rows, note = claims_of(tmp_path)
    assert [*rows] == ["ema - erm"]
    assert "2 other pairs of rows have no target and seed in common" in note


def test_methods_ranked_over_blocks(tmp_path):
    three_methods(tmp_path)
    runs = [evaluated.load_run(run) for run in evaluated.find_runs([f"{tmp_path}/*"])[0]]
    (found,) = claim_tables.rankings(runs)
    table = np.array([[r.heads["fused"] for r in runs if r.method == m] for m in ("erm", "ema", "mbcd")])
    assert found.p == pytest.approx(stats.friedmanchisquare(*table).pvalue)
    assert found.ranks["mbcd"] == 1
    assert found.blocks == 12
    assert not claim_tables.rankings([run for run in runs if run.seed == 0])
    done = compare_runs([f"{tmp_path}/*"], output=tmp_path / "out")
    assert (tmp_path / "out" / "d-video-multi-source-ranks.png").is_file()
    assert "mean rank over 12 targets x seeds" in done.files["report"].read_text()


def test_bars_join_ranks_that_hardly_differ():
    assert plots._alike([1.0, 1.5, 2.4, 4.0], 1.0) == [(0, 1), (1, 2)]
    assert plots._alike([1.0, 3.0], 1.0) == []
    assert plots._alike([1.0, 1.2, 1.4], 1.0) == [(0, 2)]


def test_seeds_that_nearly_agree_by_chance_do_not_outlive_a_correction_for_many_pairs():
    """Of 500 clips 10 are right with every seed, 20 others with each, one more with one: all is of clips, it seems."""
    differences = np.zeros((3, 500))
    differences[:, :10] = 1
    for seed in range(3):
        differences[seed, 10 + 20 * seed : 30 + 20 * seed] = 1
    differences[2, 499] = 1
    found = c.method_difference([c.TargetOutcomes(differences, np.arange(500))])
    assert found.freedom > 100
    assert found.p < 1e-6
    assert found.p_among(1) == found.p
    assert 0.05 / 250 < found.p_among(250) < 0.05
    assert found.smallest(c.ALPHA / 250) > 2 * c.smallest_difference(found.variance, found.freedom, c.ALPHA / 250)
