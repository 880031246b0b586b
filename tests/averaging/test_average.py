"""`mbcd average`: weights against explicit sums, soups by their rules, what others make of the result, refusals."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run as mbcd
from fakes import MemoryDataset, memory_settings
from helpers import in_child
from small import KINDS_ALL, small_batch, small_model

from mbcd_cli.averaging import average_runs, study
from mbcd_cli.averaging.average_runs import Valley, WantedAverage
from mbcd_cli.averaging.recipes import KeptEpoch, profile, swad, window
from mbcd_cli.averaging.soups import chosen
from mbcd_cli.averaging.study import study_averages
from mbcd_cli.averaging.weights import Bank, following, recompute
from mbcd_cli.errors import MbcdError, RunError, SettingsError
from mbcd_cli.files import read_json, read_records
from mbcd_cli.integrity import examine
from mbcd_cli.runs import opening
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.runs.folder import open_run
from mbcd_cli.runs.snapshot_files import load_snapshot
from mbcd_cli.training.profiles import KEPT, PowerProfile, gamma_of
from mbcd_cli.training.train import train
from mbcd_cli.training.validation import HeadRecord

EPOCHS = 5
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def dataset(monkeypatch):
    """In place of a prepared one on the disk."""
    dataset = MemoryDataset()
    monkeypatch.setattr(opening, "open_for_checkpoint", lambda settings, label_names: dataset)
    return dataset


def settings_of(*, method="erm", snapshots=True, **groups):
    training = {"epochs": EPOCHS, "init_seed": 0, **groups.pop("training", {})}
    average = {"beta": 0.9, "snapshots": snapshots}
    told = {"method": {"name": method}, "training": training, "average": average, "dataset": {"name": "memory"}}
    return memory_settings(**told, **groups)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs by name: ERM and MBCD with two seeds that began alike."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    for method in ("erm", "mbcd"):
        for seed in (0, 1):
            settings = settings_of(method=method, training={"seed": seed})
            where = {"run": folder / f"{method}-s{seed}", "resume": False, "overwrite": False}
            train(settings, MemoryDataset(), **where)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def average(*paths, output=None, **wanted):
    made = average_runs.average(paths, WantedAverage(**wanted), output=output, flags={"runtime.device": "cpu"})
    return made.averages


def student_of(run):
    return load_checkpoint(Path(run) / "checkpoints/best.pt").student


def explicit(run, weights_of):
    """Sum over epochs of what `weights_of` a snapshot says, in float64."""
    total = {}
    for epoch in range(1, EPOCHS + 1):
        for weight, state in weights_of(load_snapshot(run, epoch)):
            for name, value in state.items():
                total[name] = total.get(name, 0) + weight * value.double()
    return total


def assert_weights(run, expected):
    got = student_of(run)
    assert {name for name, value in got.items() if value.is_floating_point()} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["erm", "mbcd"])
def test_a_window_is_the_mean_over_its_steps(runs, method):
    run = runs / f"{method}-s0"
    (made,) = average(run, window=(2, 4))
    place = runs / f"{method}-s0-window-2-4"
    steps = {epoch: load_snapshot(run, epoch).steps for epoch in (2, 3, 4)}
    mean = explicit(run, lambda s: [(steps.get(s.epoch, 0) / sum(steps.values()), s.mean)])
    assert_weights(place, mean)
    assert made.label == "epochs 2 to 4"
    counters, got = load_snapshot(run, 4).counters, student_of(place)
    assert counters
    assert {name: int(got[name]) for name in counters} == {name: int(value) for name, value in counters.items()}
    told = read_json(place / "average.json")
    assert [part["epoch"] for part in told["recipe"]["parts"]] == [2, 3, 4]
    assert sum(part["weight"] for part in told["recipe"]["parts"]) == pytest.approx(1)
    assert "beta" not in (place / "average.json").read_text()
    made = load_checkpoint(place / "checkpoints/best.pt")
    assert (made.averaged, made.epoch) == (told, 4), "the last that is in it, not the one that the run selected"
    assert examine(place).faults == []


def test_a_profile_is_what_it_says(runs):
    run = runs / "mbcd-s0"
    (made,) = average(run, profile=0.07)
    parts = {(part.epoch, part.gamma): part.weight for part in made.recipe.parts}
    gammas = [gamma_of(sigma) for sigma in KEPT]

    def weights_of(snapshot):
        return [
            (parts.get((snapshot.epoch, gamma), 0.0), state)
            for gamma, state in zip(gammas, snapshot.averages, strict=True)
        ]

    assert_weights(runs / "mbcd-s0-profile-0.07", explicit(run, weights_of))
    steps = [record["step"] for record in read_records(run / "metrics.jsonl")]
    found = sum(
        weight * PowerProfile(steps[epoch - 1], gamma).of_steps(steps[-1]) for (epoch, gamma), weight in parts.items()
    )
    wanted = PowerProfile(steps[-1], gamma_of(0.07)).of_steps(steps[-1])
    assert np.abs(found - wanted).sum() == pytest.approx(made.recipe.fit.distance, abs=1e-9)
    assert sum(parts.values()) == pytest.approx(1, abs=1e-9)
    assert made.label == "deployed profile 0.07"
    (kept,) = average(run, profile=0.1)
    assert [(part.epoch, part.weight) for part in kept.recipe.parts] == [(EPOCHS, pytest.approx(1, abs=1e-9))]


def epochs_of(losses):
    return [KeptEpoch(k + 1, 10 * (k + 1), 10, loss) for k, loss in enumerate(losses)]


def test_swad_by_the_clean_rule_as_published_and_without_a_valley():
    losses = [1.5, 1.2, 1, 0.8, 0.7, 0.6, 0.55, 0.57, 0.6, 0.62, 0.7, 0.72, 0.75, 0.8, 0.9, 1, 1.1, 1.2, 1.3]
    paper = {"converge": 3, "leave": 6, "tolerance": 1.3}
    clean, published = (swad(epochs_of(losses), **paper, published=how) for how in (False, True))
    assert [(part.epoch - 1, part.weight) for part in clean.parts] == [(t, pytest.approx(1 / 6)) for t in range(6, 12)]
    assert {part.epoch - 1: part.weight for part in published.parts} == {
        t: pytest.approx((2 if t == 6 else 1) / 8) for t in range(5, 12)
    }
    none = swad(epochs_of([1, 0.9, 0.8, 0.7]), **paper)
    assert [(part.epoch, part.weight) for part in none.parts] == [(4, 1.0)]
    assert "No valley" in none.warnings[0]


def test_swad_after_the_fact_is_what_training_with_it_would_have_deployed(runs, tmp_path, dataset):
    constants = {"converge": 2, "leave": 2, "tolerance": 1.1}
    beside = settings_of().model_copy(
        update={"average": settings_of().average.model_copy(update={"kind": "swad", **constants})}
    )
    train(beside, dataset, run=tmp_path / "swad", resume=False, overwrite=False)
    (made,) = average(runs / "erm-s0", valley=Valley(**constants))
    teacher = load_checkpoint(tmp_path / "swad/checkpoints/last.pt").teacher
    got = student_of(runs / "erm-s0-swad-2-2-1.1")
    for name, value in teacher.items():
        if not name.startswith("heads."):
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)
    assert made.recipe.epochs[0] >= 1


def test_a_far_profile_is_told():
    assert "L1 distance" in profile(epochs_of([1.0, 1.0]), 0.2).warnings[0]
    assert profile(epochs_of([1.0] * 20), 0.15).warnings == []


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("uniform", [2, 1, 0, 3]), ("greedy", [2, 1]), ("restricted", [2, 1, 0])],
)
def test_soups_keep_what_their_rule_says(rule, expected):
    """Of runs 2, 1, 0, 3 in order of accuracy and loss: 1 helps, 0 changes nothing, 3 harms."""
    alone = [HeadRecord(a, loss) for a, loss in [(0.8, 0.6), (0.8, 0.5), (0.9, 0.9), (0.7, 0.1)]]

    def accuracy_of(numbers):
        return 0.9 + 0.05 * (1 in numbers) - 0.2 * (3 in numbers)

    kept, _ = chosen(alone, rule, accuracy_of)
    assert kept == expected


def test_a_soup_is_the_mean_of_what_its_runs_deploy(runs):
    made = average(runs, soup="uniform")
    assert [one.method for one in made] == ["erm", "mbcd"]
    for one, method in zip(made, ("erm", "mbcd"), strict=True):
        states = []
        for seed in (0, 1):
            best = load_checkpoint(runs / f"{method}-s{seed}/checkpoints/best.pt")
            heads = {name: value for name, value in best.student.items() if name.startswith("heads.")}
            states.append(best.student if best.teacher is None else {**best.teacher, **heads})
        floats = [name for name, value in states[0].items() if value.is_floating_point()]
        expected = {name: (states[0][name].double() + states[1][name].double()) / 2 for name in floats}
        assert_weights(runs / f"{method}-left+right-c-soup-uniform", expected)
        assert [of.weight for of in one.of] == [0.5, 0.5]
    # Averages that lie among the runs are none of them.
    # Of all targets one row, however many runs each keeps.
    assert [one.label for one in average(runs, soup="greedy")] == ["greedy soup of 2 runs"] * 2


def test_statistics_recomputed_are_the_means_over_the_batches():
    model = small_model(2, KINDS_ALL, dropout=0.4)
    batches = [small_batch(2, KINDS_ALL, size=size, seed=size) for size in (7, 5, 1)]
    assert len(following(model)) == 3
    assert recompute(model, batches, precision="float32") == 12
    first = dict(model.named_modules())["tails.video.layer1"]
    seen = [first[0](batch.inputs["video"][0]) for batch in batches[:2]]
    mean, variance = (
        sum(len(x) / 12 * statistic for x, statistic in zip(seen, of, strict=True))
        for of in ([x.mean((0, 2)) for x in seen], [x.var((0, 2)) for x in seen])
    )
    torch.testing.assert_close(first[1].running_mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(first[1].running_var, variance, rtol=0, atol=1e-12)
    assert model.training
    assert first[1].momentum == 0.1


def test_recomputed_statistics_and_a_variance_below_zero(runs, dataset):
    (averaged,), (recomputed,) = (
        average(runs / "erm-s0", window=(1, 5), statistics=how) for how in ("averaged", "recomputed")
    )
    assert (averaged.statistics.source, recomputed.statistics.source) == ("averaged", "recomputed")
    assert recomputed.label == "epochs 1 to 5, statistics recomputed"
    assert recomputed.statistics.clips == len(dataset.select(domains=("a", "b"), splits=("train",)))
    one, other = (student_of(runs / f"erm-s0-window-1-5{suffix}") for suffix in ("", "-recomputed"))
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    assert differ
    assert all("running" in name or "num_batches" in name for name in differ)
    (mixed,) = average(runs / "erm-s0", runs / "erm-s1", soup="uniform", statistics="recomputed")
    assert mixed.statistics == recomputed.statistics
    best = load_checkpoint(runs / "erm-s0/checkpoints/best.pt")
    state = {name: -value if "running_var" in name else value for name, value in best.student.items()}
    bank = Bank(best.settings, dataset, statistics="averaged", device=CPU)
    with pytest.raises(MbcdError, match="fell below zero"):
        bank.model(best, state)


def test_nothing_of_the_target_is_read(runs, dataset):
    target = dataset.domain == 2
    for values in (*dataset.arrays.values(), *dataset.training.values()):
        values[target] = float("nan")
    dataset.labels[target] = 0
    made = average(runs / "erm-s0", window=(1, 5), statistics="recomputed") + average(runs, soup="greedy")
    assert all(np.isfinite(one.validation.loss) for one in made)


def test_evaluate_landscape_and_adapt_take_it_as_any_other(runs, tmp_path):
    average(runs / "mbcd-s0", profile=0.1)
    place = runs / "mbcd-s0-profile-0.1"
    quick = ("--set", "evaluation.analyses=[]", "--set", "evaluation.report=false", "--device", "cpu")
    mbcd("evaluate", "--run", runs / "mbcd-s0", *quick)
    assert "mbcd (deployed profile 0.1)" in mbcd("evaluate", "--run", place, *quick).stdout
    results = read_json(place / "results.json")
    assert results["headline"]["model"] == "student"
    cuts = ("--set", 'landscape.analyses=["flatness"]', "--set", "landscape.directions=2", "--device", "cpu")
    mbcd("landscape", "--checkpoint", place / "checkpoints/best.pt", *cuts)
    assert (place / "landscape/landscape.json").is_file()
    told = mbcd("evaluate", "--runs", runs / "mbcd-s0*", "--output", tmp_path / "compared", "--json").data
    assert {row[0] for row in told["tables"][0]["rows"]} >= {"mbcd", "mbcd (deployed profile 0.1)"}
    assert examine(place).faults == []
    average(runs / "mbcd-s0", profile=0.1)  # in its place
    assert not (place / "results.json").exists()
    with pytest.raises(RunError, match="holds an average"):
        open_run(place, settings=settings_of(method="mbcd"), resume=True, overwrite=False)
    with pytest.raises(RunError, match="holds an average"):
        open_run(place, settings=settings_of(method="mbcd"), resume=False, overwrite=True)


def test_a_study_measures_what_evaluate_and_landscape_do(runs, tmp_path, dataset):
    pair, sets = [runs / "mbcd-s0", runs / "mbcd-s1"], ("landscape.directions=2", "landscape.ascent_steps=2")
    how = {"output": tmp_path / "study", "sets": sets, "flags": {"runtime.device": "cpu"}}
    done = study_averages(pair, **how)
    assert [text for text in done.warnings if text.startswith("SWAD: No valley") and "of 2 runs" in text]
    told = read_json(tmp_path / "study/study.json")
    assert {one["method"] for one in told["worth"]} == {"mbcd"}
    names = {one["average"] for one in told["worth"]}
    assert names == {
        *("as trained", "student, last epoch", "SWAD", "SWAD as published", "epochs 4 to 5", "epochs 3 to 5"),
        *(f"deployed profile {sigma}" for sigma in (0.05, 0.1, 0.15, 0.2)),
        *("uniform soup", "greedy soup", "restricted soup"),
    }
    assert (tmp_path / "study/study.png").stat().st_size > 10_000
    assert set(told["files"]) == {"study.png", "study.csv", "study.md"}
    (one,) = [w for w in told["worth"] if (w["average"], w["method"], w["seed"]) == ("epochs 4 to 5", "mbcd", 1)]
    average(runs / "mbcd-s1", window=(4, 5))
    place = runs / "mbcd-s1-window-4-5"
    mbcd("evaluate", "--run", place, "--set", "evaluation.analyses=[]", "--set", "evaluation.report=false")
    figures = read_json(place / "results.json")["models"]["best"]["student"]
    assert one["target"] == pytest.approx(100 * figures["target"]["fused"]["top1"])
    assert one["source"] == pytest.approx(100 * figures["source"]["fused"]["top1"])
    asked = (
        "--set",
        'landscape.analyses=["flatness", "worst_case"]',
        "--device",
        "cpu",
        "--set",
        sets[0],
        "--set",
        sets[1],
    )
    mbcd("landscape", "--checkpoint", place / "checkpoints/best.pt", *asked)
    (flat,) = read_json(place / "landscape/landscape.json")["checkpoints"].values()
    assert one["increase"] == pytest.approx(flat["flatness"]["mean_increase"][-1], rel=1e-5)
    assert one["worst"] == pytest.approx(flat["worst_case"]["increase"][1], rel=1e-5)
    # Nothing is measured twice.
    before = (tmp_path / "study/study.jsonl").read_bytes()
    shutil.rmtree(place)
    again = study_averages(pair, **how)
    assert (tmp_path / "study/study.jsonl").read_bytes() == before
    assert again.tables == done.tables


def test_a_measurement_is_of_the_runs_as_they_are(runs, dataset):
    """Trained again, with the same name: what was measured before is of other weights."""
    run = runs / "erm-s0"
    bank = Bank(load_checkpoint(run / "checkpoints/best.pt").settings, dataset, statistics="averaged", device=CPU)
    candidate = study._Candidate("SWAD", [run], bank, lambda: None)
    before = study._key(candidate, "averaged")
    assert study._key(candidate, "averaged") == before != study._key(candidate, "recomputed")
    bank.settings = bank.settings.model_copy(
        update={"runtime": bank.settings.runtime.model_copy(update={"precision": "bfloat16"})}
    )
    assert study._key(candidate, "averaged") != before
    shutil.copy(runs / "erm-s1/done", run / "done")
    assert study._key(candidate, "averaged") != before


def test_what_is_refused(runs, tmp_path, dataset):
    def refused(message, *paths, kind=RunError, **wanted):
        with pytest.raises(kind, match=message):
            average(*paths, **wanted)

    refused("has epochs 1 to 5", runs / "erm-s0", window=(3, 9), kind=SettingsError)
    refused("has epochs 1 to 5", runs / "erm-s0", window=(4, 3), kind=SettingsError)
    refused("relative width", runs / "erm-s0", profile=0.5, kind=SettingsError)
    refused("There is no run", tmp_path / "nowhere", window=(1, 2))
    refused("No other run", runs / "erm-s0", soup="greedy")
    refused("No other run", runs / "erm-s0", runs / "mbcd-s0", soup="greedy")
    others = {"drawn": {"training": {"init_seed": None, "seed": 3}}, "wide": {"model": {"hidden": 9}}}
    for name, groups in others.items():
        train(settings_of(snapshots=False, **groups), dataset, run=tmp_path / name, resume=False, overwrite=False)
    refused("began with other weights", runs / "erm-s0", tmp_path / "drawn", soup="uniform")
    refused("have other heads", runs / "erm-s0", tmp_path / "wide", soup="uniform")
    refused("has kept no averages", tmp_path / "drawn", profile=0.1)
    average(runs / "erm-s0", window=(1, 2))
    refused("is an average itself", runs / "erm-s0-window-1-2", window=(1, 1))
    (tmp_path / "full/of").mkdir(parents=True)
    refused("is in the way", runs / "erm-s0", window=(1, 2), output=tmp_path / "full")
    (runs / "erm-s1/done").unlink()
    refused("not trained to its end", runs / "erm-s1", window=(1, 2))


def test_no_average_of_a_command_takes_the_place_of_another_or_of_what_it_is_of(runs, tmp_path, trained):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    out = tmp_path / "out"
    with pytest.raises(RunError, match="would both be"):
        average(runs / "erm-s0", other / "erm-s0", window=(1, 2), output=out)
    assert not out.exists()
    average(runs, window=(1, 2))
    own = [runs / f"erm-s{seed}-window-1-2" for seed in (0, 1)]
    with pytest.raises(RunError, match="the average is of it"):
        average(*own, soup="uniform", output=own[0])
    assert len(average(*own, soup="uniform")[0].of) == 2


def test_swad_with_other_constants_is_another_average(runs):
    run, called = runs / "erm-s0", []
    for valley in (Valley(), Valley(2, 3, 1.2), Valley(2, 2, 1.2, published=True)):
        called.append(average(run, valley=valley)[0])
    assert [one.label for one in called] == ["SWAD", "SWAD, valley 2,3,1.2", "SWAD as published, valley 2,2,1.2"]
    assert [Path(one.run).name for one in called] == [
        "erm-s0-swad",
        "erm-s0-swad-2-3-1.2",
        "erm-s0-swad-published-2-2-1.2",
    ]


@pytest.mark.parametrize(
    ("told", "source", "clips"),
    [({"batch_size": 1}, "recomputed", 1), ({"batch_norm": "frozen"}, "none", 0)],
)
def test_statistics_of_runs_with_batches_of_one_clip_and_with_frozen_batch_norms(runs, dataset, told, source, clips):
    best = load_checkpoint(runs / "erm-s0/checkpoints/best.pt")
    training = best.settings.training.model_copy(update=told)
    settings = best.settings.model_copy(update={"training": training})
    bank = Bank(settings, dataset, statistics="recomputed", device=CPU)
    _, statistics = bank.model(best, best.student)
    assert statistics.source == source
    assert statistics.clips >= clips * (len(dataset.select(domains=("a", "b"), splits=("train",))) - 1)


@pytest.mark.parametrize("event", [1, 2, 4, 5, 6])
def test_killed_while_it_takes_the_place_of_an_average(runs, event):
    """At each kind of deletion and the renaming: the same command makes it whole again."""
    run, made = runs / "erm-s0", runs / "erm-s0-window-1-2"
    average(run, window=(1, 2))
    expected, files = student_of(made), sorted(made.rglob("*"))
    of_ours = itertools.count(1)

    def killed():
        def counted(function):
            def wrapper(*words, **more):
                ours = "dir_fd" in more or str(made) == str(words[-1]) or made in Path(words[0]).parents
                if ours and next(of_ours) == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*words, **more)

            return wrapper

        for name in ("unlink", "rmdir", "replace"):
            setattr(os, name, counted(getattr(os, name)))
        average(run, window=(1, 2))

    assert os.WIFSIGNALED(in_child(killed))
    average(run, window=(1, 2))
    assert sorted(made.rglob("*")) == files
    assert all(torch.equal(value, expected[name]) for name, value in student_of(made).items())


def test_a_sealed_target_stays_sealed(runs, tmp_path, dataset):
    settings = settings_of()
    sealed = settings.model_copy(update={"dataset": settings.dataset.model_copy(update={"seal_target": True})})
    train(sealed, dataset, run=tmp_path / "sealed", resume=False, overwrite=False)
    average(tmp_path / "sealed", window=(1, 5))
    plain = ("--set", "evaluation.report=false", "--json")
    results = mbcd("evaluate", "--run", tmp_path / "sealed-window-1-5", *plain).data
    assert results["headline"]["clips"] == "source"
    # Not opened by an open run that is named first, or that is in a soup with it.
    both = {
        name: folder / "checkpoints/best.pt" for name, folder in (("a", runs / "erm-s0"), ("b", tmp_path / "sealed"))
    }
    assert opening.load_checkpoints(both, config=None, sets=(), flags={})[0].dataset.seal_target
    with pytest.raises(RunError, match="have other target or seal"):
        average(runs / "erm-s0", tmp_path / "sealed", soup="uniform")
    with pytest.raises(MbcdError, match="is sealed"):
        study_averages([tmp_path / "sealed"], output=tmp_path / "study", flags={"runtime.device": "cpu"})


def test_the_command(runs):
    cpu = ("--device", "cpu")
    told = mbcd("average", runs / "erm-s0", "--swad", "--valley", "2,2,1.1", "--published", *cpu, "--json").data
    assert told["averages"][0]["label"] == "SWAD as published, valley 2,2,1.1"
    shown = mbcd("average", runs / "erm-s0", "--window", "2..4", *cpu).stdout
    assert f"mbcd evaluate --run {runs}/erm-s0-window-2-4" in shown.replace("\n", "")
    for words in (
        [],
        ["--window", "1..2", "--profile", "0.1"],
        ["--window", "1..2", "--published"],
        ["--window", "1..2", "--statistics", "x"],
        ["--soup", "thick"],
        ["--soup", ""],
        ["--swad", "--valley", "3"],
        ["--swad", "--valley", "0,1,1"],
        ["--window", "1-2"],
    ):
        mbcd("average", runs / "erm-s0", *words, code=2)


def test_a_window_weighs_epochs_by_their_steps():
    kept = [replace(one, steps=steps) for one, steps in zip(epochs_of([1.0, 1.0, 1.0]), (10, 10, 5), strict=True)]
    assert [part.weight for part in window(kept, 2, 3).parts] == pytest.approx([2 / 3, 1 / 3])
