"""An equal search: what is tried, what is chosen, what is reported."""

from __future__ import annotations

import pytest
from sweep_cases import finish, plan_of

from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.files import write_json
from mbcd_cli.launch.engines import Launching
from mbcd_cli.launch.unit import beside
from mbcd_cli.methods import METHODS
from mbcd_cli.resolved import resolve
from mbcd_cli.settings import AROUND, Range
from mbcd_cli.settings.ranges import searched
from mbcd_cli.sweep import run as running
from mbcd_cli.sweep import sweep as sweeping
from mbcd_cli.sweep.packing import kind
from mbcd_cli.sweep.request import Request, output_of, search_of, title_of
from mbcd_cli.sweep.search import TRIAL_SEEDS, Search


def search_for(preset="hac", runs=None, sets=(), **request):
    asked = {"targets": "human", "methods": "erm", "modality_sets": None, "search": 3} | request
    cells = plan_of(preset, sets=sets, **({} if runs is None else {"runs": runs}), **asked)
    return search_of(Request(**asked), cells, sets=sets)


def held_out(accuracy, loss=1.0, epoch=1, *, best=None, target=0.5):
    def of(value, cross_entropy):
        head = {"accuracy": value, "loss": cross_entropy}
        return {"teacher": {"fused": head}, "student": {"fused": {"accuracy": 0.0, "loss": 9.0}}}

    return {"epoch": epoch, "best_epoch": best or epoch, "validation": of(accuracy, loss), "target": of(target, 1.0)}


def finished(trial, *records):
    finish(trial.cell, top1=0.5, records=records)


def fail(cell, why="the loss of step 3 is not finite"):
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(beside(cell.folder, "failed"), {"error": why, "remedy": ""})


# ---- what is tried


def test_everyone_tries_as_many_configurations_each_with_its_own_seed():
    trials = search_for(methods="erm,mbcd,ogm-ge", targets="all", modality_sets="va,af").trials()
    assert len(trials) == 3 * 3 * 2 * 4
    assert len({trial.cell.key for trial in trials}) == len({trial.cell.folder for trial in trials}) == len(trials)
    assert all(trial.cell.settings.training.seed in TRIAL_SEEDS for trial in trials)
    assert [trial.cell.name.rpartition(", ")[2] for trial in trials[:4]] == ["trial 0", "trial 1", "trial 2", "trial 3"]
    # No more than numbers differ: all of a method are one population.
    for method in ("erm", "mbcd", "ogm-ge"):
        same = {kind(t.cell.settings) for t in trials if t.base.method == method}
        assert len(same) == 2, "one per set of modalities"


def test_the_first_trial_is_the_default_and_a_longer_search_has_the_same_beginning():
    short, long = search_for(methods="mbcd"), search_for(methods="erm,mbcd,sam", search=5)
    sealed = ("dataset.seal_target=true",)  # as a search has it, unless told otherwise
    (ordinary,) = plan_of("hac", sets=sealed, targets="human", methods="mbcd", seeds="1")
    told = search_for(methods="mbcd", sets=("dataset.seal_target=false",))
    assert not told.bases[0].settings.dataset.seal_target
    seed = short.trials()[0].cell.settings.training.seed
    (same,) = plan_of("hac", sets=sealed, targets="human", methods="mbcd", seeds=f"{seed},{seed}")
    assert short.trials()[0].cell.key == same.key
    assert short.bases[0].key == ordinary.key
    of_mbcd = [trial.cell.key for trial in long.trials() if trial.base.method == "mbcd"]
    assert [trial.cell.key for trial in short.trials()] == of_mbcd[:4]
    drawn = short.trials()[1]
    assert drawn.drawn == {
        "model.dropout": 0.2434,
        "method.consistency.alpha": 0.0001853,
        "method.distillation.weight": 0.7942,
        "average.beta": 0.946,
        "optimizer.lr": 0.0008564,
        "optimizer.weight_decay": 0.0005128,
    }, "run folders are found again by these numbers, whatever the machine and the versions"
    assert drawn.cell.settings.training.seed == 8095145


def test_shared_settings_are_drawn_alike_for_all_methods_of_a_target():
    trials = search_for(methods="erm,ema,mbcd", targets="human,animal").trials()
    drawn = {(t.base.method, t.cell.settings.training.target_domain, t.number): t.drawn for t in trials}
    for shared in ("optimizer.lr", "optimizer.weight_decay", "model.dropout"):
        assert drawn["erm", "human", 2][shared] == drawn["mbcd", "human", 2][shared]
        assert len({drawn["erm", where, k][shared] for where in ("human", "animal") for k in (1, 2, 3)}) == 6
    assert drawn["ema", "human", 1]["average.beta"] == drawn["mbcd", "human", 1]["average.beta"]
    assert "average.beta" not in drawn["erm", "human", 1]
    assert drawn["mbcd", "human", 0] == {}


def test_what_is_set_or_an_axis_or_off_is_not_searched():
    said = []
    request = Request(targets="human", methods="mbcd", search=2, grid=("model.dropout=0.2,0.4",))
    sets = ["optimizer.lr=3e-4", "method.distillation.enabled=false", "optimizer.weight_decay=0"]
    cells = plan_of("hac", sets=sets, targets="human", methods="mbcd", search=2, grid=request.grid)
    search = search_of(request, cells, sets=sets, say=said.append)
    assert [row.setting for row in search.settings()] == ["method.consistency.alpha", "average.beta"]
    assert said == ["Set, and so not searched: optimizer.lr."], "decay is none: nothing was to be drawn"
    one, other = (trial for trial in search.trials() if trial.number == 1)
    assert one.drawn == other.drawn
    assert {t.cell.settings.optimizer.lr for t in search.trials()} == {3e-4}
    assert {t.cell.settings.model.dropout for t in search.trials()} == {0.2, 0.4}


def test_ranges_follow_what_is_set_for_the_dataset():
    (row,) = (r for r in search_for(sets=["model.hidden=8"]).settings() if r.setting == "optimizer.lr")
    assert (row.low, row.high, row.methods) == (1e-5, 1e-3, ["erm"])
    assert AROUND.draw(0.5, 3e-4) == pytest.approx(3e-4)
    assert AROUND.draw(0.25, 1.0) == 0.3162, "four digits, even by the logarithm"
    assert [Range(choices=(4, 8)).draw(share, 8) for share in (0.0, 0.49, 0.5, 0.99)] == [4, 4, 8, 8]
    assert str(Range(choices=(4, 8))) == "among 4, 8"


@pytest.mark.parametrize("method", METHODS)
def test_every_draw_of_a_range_is_allowed(method):
    settings = resolve(preset="hac", method=method)
    for path, drawn_from, value in searched(settings):
        for share in (0.0, 0.5, 1 - 1e-12):
            for benchmark in (False, True):
                if not benchmark or drawn_from.benchmark is not None:
                    drawn = drawn_from.draw(share, value, benchmark=benchmark)
                    resolve(preset="hac", method=method, sets=[f"{path}={drawn}"])
                    assert drawn_from.bounds(value)[0] <= drawn <= drawn_from.bounds(value)[1]


def test_a_range_of_somebodys_method_beyond_what_is_allowed_is_told(tmp_path):
    (tmp_path / "own.py").write_text(
        "from typing import Annotated\nfrom mbcd_cli.methods.base import Method\n"
        "from mbcd_cli.settings import Fraction, MethodSettings, Range\n"
        "class Settings(MethodSettings):\n    rate: Annotated[Fraction, Range(2, 3)] = 0.5\n    '''A rate.'''\n"
        "class Own(Method):\n    Settings = Settings\n"
    )
    with pytest.raises(SettingsError, match=r"method.rate: .* \[from the range that is searched\]"):
        search_for(methods=f"{tmp_path / 'own.py'}:Own").trials()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"search": 0}, "--search 0: no configuration"),
        ({"search": 3, "search_protocol": "fair"}, "no search protocol 'fair'"),
        ({"search_protocol": "mmdg-bench"}, "Add --search 10"),
        ({"search": 3, "seeds": "0,1234567"}, "--seeds 1234567"),
    ],
)
def test_searches_that_cannot_be_are_refused(request_, words):
    with pytest.raises(SettingsError) as caught:
        plan_of("hac", **request_)
    assert words in str(caught.value)


# ---- what is chosen


def test_the_best_by_validation_accuracy_then_loss_then_number(tmp_path):
    search = search_for(runs=tmp_path, methods="mbcd")
    zero, one, two, three = search.trials()
    finished(zero, held_out(0.7, 0.5))
    finished(one, held_out(0.8, 0.6))
    finished(two, held_out(0.8, 0.4, epoch=1), held_out(0.1, 9.0, epoch=2, best=1))
    finished(three, held_out(0.8, 0.4))
    ((choice,), notes) = search.choose(search.trials(), over=True)
    assert (choice.trial.number, choice.validation.accuracy, choice.validation.loss) == (2, 0.8, 0.4)
    assert notes == []
    finished(two, held_out(0.8, None))
    ((choice,), _) = search.choose(search.trials(), over=True)
    assert choice.trial.number == 3
    assert {cell.settings.optimizer.lr for cell in search.reported(choice)} == {three.drawn["optimizer.lr"]}


def test_no_figure_of_the_target_is_read(tmp_path):
    search = search_for(runs=tmp_path, methods="mbcd")
    accuracies = (0.5, 0.8, 0.6, 0.7)

    def chosen(targets):
        for trial, accuracy, target in zip(search.trials(), accuracies, targets, strict=True):
            finished(trial, held_out(accuracy, target=target))
            write_json(trial.cell.folder / "results.json", {"of": "nobody's business"})
        return search.choose(search.trials(), over=False)[0][0].trial.number

    assert chosen((0.9, 0.1, 0.2, 0.3)) == chosen((0.1, 0.9, 0.2, 0.3)) == chosen((0.0, 0.0, 1.0, 0.0)) == 1


def test_the_checkpoint_that_is_deployed_is_judged(tmp_path):
    sets = ['evaluation.checkpoints=["last"]']
    last, best = (search_for(runs=tmp_path, methods="mbcd", sets=s) for s in (sets, ()))
    for trial, accuracies in zip(last.trials(), ((0.9, 0.1), (0.6, 0.5), (0.5, 0.4), (0.4, 0.3)), strict=True):
        finished(trial, *(held_out(a, epoch=1 + i, best=1) for i, a in enumerate(accuracies)))
    assert last.choose(last.trials(), over=True)[0][0].trial.number == 1
    assert best.choose(best.trials(), over=True)[0][0].trial.number == 0


def test_failed_and_unfinished_trials(tmp_path):
    search = search_for(runs=tmp_path)
    zero, one, two, three = search.trials()
    finished(one, held_out(0.6))
    finished(two, held_out(0.5))
    fail(three.cell)
    choices, notes = search.choose(search.trials(), over=False)
    assert choices == []
    assert notes[0] == f"{three.cell.name} failed and counts as the worst: the loss of step 3 is not finite"
    assert "1 of 4 trials are not finished, so that nothing is chosen" in notes[1]
    choices, notes = search.choose(search.trials(), over=True)  # killed again and again
    assert [choice.trial.number for choice in choices] == [1]
    assert notes[0].startswith(f"{zero.cell.name} failed and counts as the worst: no validation in ")
    (two.cell.folder / "metrics.jsonl").write_text("[]\n")
    (one.cell.folder / "metrics.jsonl").write_text("broken\n{}\n")
    assert search.choose(search.trials(), over=True)[0] == []


# ---- as the public benchmark does it


def test_the_benchmarks_spaces_are_the_published_ones():
    asked = {"methods": "erm,rna-net,simmmdg,moosa,cmrf,nel,jat-benchmark,gmp-benchmark,mbcd", "search": 10}
    search = search_for(search_protocol="mmdg-bench", **asked)
    spaces = {}
    for row in search.settings():
        for method in row.methods:
            spaces.setdefault(method, {})[row.setting.rpartition(".")[2]] = (row.low, row.high)
    assert spaces == {
        "rna-net": {"weight": (0, 3)},
        "simmmdg": {"translation": (0, 1), "contrast": (0, 5), "distance": (0, 1)},
        "moosa": {"entropy": (0, 1), "jigsaw": (0, 3), "masked": (0, 1)},
        "cmrf": {"unimodal_weight": (0, 5), "distillation": (0, 5)},
        "nel": {
            "agreement": (0, 1),
            "flatness": (0, 1),
            "neighbours": (4, 16),
            "agreement_temperature": (0.1, 1),
            "temperature": (0.1, 1),
        },
        "jat-benchmark": {
            "unimodal_weight": (0, 5),
            "modality_weight": (0, 1),
            "domain_weight": (0, 1),
            "modality_reversal": (0, 1),
            "domain_reversal": (0, 1),
        },
        "gmp-benchmark": {"unimodal_weight": (0, 5), "reversal": (0, 1), "alpha_class": (0, 1), "alpha_domain": (0, 1)},
        "mbcd": {"weight": (0, 2), "beta": (0.9, 0.9999)},
    }
    trials = search.trials()
    assert len(trials) == 9 * 11
    of_erm = [trial for trial in trials if trial.base.method == "erm"]
    assert [trial.drawn for trial in of_erm] == [{}] * 11, "eleven runs that differ in the seed"
    assert len({trial.cell.settings.training.seed for trial in of_erm}) == 11
    weights = [trial.drawn["method.weight"] for trial in trials if trial.base.method == "rna-net" and trial.number]
    assert weights == [round(weight, 1) for weight in weights]


def test_the_benchmark_reports_the_chosen_trial_and_reruns(tmp_path):
    search = search_for(runs=tmp_path, search_protocol="mmdg-bench", methods="mbcd")
    for trial in search.trials():
        finished(trial, held_out(0.5 + 0.1 * trial.number))
    ((choice,), _) = search.choose(search.trials(), over=True)
    trial, *reruns = search.reported(choice)
    assert trial == search.trials()[3].cell
    assert [cell.settings.training.seed for cell in reruns] == [0, 1]
    assert {cell.settings.average.beta for cell in (trial, *reruns)} == {choice.trial.drawn["average.beta"]}
    assert trial.settings.evaluation == reruns[0].settings.evaluation, "it is evaluated like a run that is reported"
    assert [cell.key for cell in search.expected(search.trials())] == [cell.key for cell in reruns]


# ---- both phases


@pytest.fixture
def trained(monkeypatch):
    """Runs are finished at once, the better the higher the learning rate; what was begun, phase by phase."""
    phases = []

    def run(cells, *, how, **_):
        phases.append([cell for cell in cells if not (cell.folder / "done").exists()])
        failed = {}
        for cell in phases[-1]:
            if "diverges" in how.slurm or (cell.trial == 2 and "once" in how.slurm):
                fail(cell)
                failed[str(cell.folder)] = "the loss of step 3 is not finite"
                continue
            finish(cell, top1=0.5, records=[held_out(min(1.0, 1000 * cell.settings.optimizer.lr))])
        return sweeping.SweepOutcome(failed, len(cells) - len(failed), 1.0)

    monkeypatch.setattr(running, "run", run)
    return phases


def sweep(tmp_path, how=(), collect=False, **request):
    asked = {"targets": "human", "methods": "erm,mbcd", "search": 3, "modality_sets": "va"} | request
    layers = {"preset": "hac", "config": None, "sets": (), "flags": {}}
    places = {"runs_dir": tmp_path / "runs", "output": tmp_path / "out"}
    return sweeping.sweep(Request(**asked), **layers, **places, how=Launching(slurm=how), collect=collect)


def of_choices(swept):
    (table,) = (table for table in swept.comparison.tables if table.name.endswith("-search"))
    return table


def test_only_fresh_runs_of_the_chosen_are_in_the_tables(tmp_path, trained):
    swept = sweep(tmp_path)
    assert [len(phase) for phase in trained] == [2 * 4, 2 * 3]
    assert swept.outcome == sweeping.SweepOutcome({}, 14, 2.0)
    assert len(swept.comparison.runs) == 6
    assert sorted(cell.settings.training.seed for cell in trained[1]) == [0, 0, 1, 1, 2, 2]
    rates = {trial.drawn.get("optimizer.lr", 1e-4) for trial in search_for(runs=tmp_path, modality_sets="va").trials()}
    assert {cell.settings.optimizer.lr for cell in trained[1]} == {max(rates)}
    table = of_choices(swept)
    assert [row[0] for row in table.rows] == ["erm", "mbcd"]
    assert f"optimizer.lr {max(rates):g}" in table.rows[0][-1]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "equal search" in page
    assert page.count(", trial 1</a>") == 2, "trials are linked"
    # A longer search keeps the trials that there are, and nothing is done twice.
    longer = sweep(tmp_path, search=4)
    assert [[cell.trial for cell in phase] for phase in trained[2:]] == [[4, 4], []]
    assert longer.comparison.runs == swept.comparison.runs


def test_a_search_that_was_cut_off_is_gone_on_with(tmp_path, trained, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Search, "choose", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path)
    with pytest.raises(RunError, match="No run of this sweep is finished"):
        sweep(tmp_path, collect=True)
    assert len(sweep(tmp_path).comparison.runs) == 6
    assert [len(phase) for phase in trained] == [8, 0, 6]
    assert len(sweep(tmp_path, collect=True).comparison.runs) == 6
    with pytest.raises(RunError, match="8 of 12 trials are not finished, so that nothing is chosen"):
        sweep(tmp_path, search=11, collect=True)


def test_a_trial_that_diverges_is_told_and_fails_nothing(tmp_path, trained):
    swept = sweep(tmp_path, how=("once",))
    assert swept.outcome.failed == {}
    assert sum("trial 2 failed and counts as the worst" in note for note in swept.comparison.warnings) == 2
    with pytest.raises(RunError, match="8 runs failed"):
        sweep(tmp_path / "other", how=("diverges",))


def test_names_say_which_search_it_was(tmp_path, trained):
    cells = plan_of("hac", targets="human", search=3)
    ours, theirs = Request(search=3), Request(search=10, search_protocol="mmdg-bench")
    assert title_of(ours, cells).endswith("sweep of erm, mbcd, equal search of 3 and the default")
    assert output_of(ours, cells).name == "hac-equal-search-3"
    assert output_of(theirs, cells).name == "hac-mmdg-bench-search-10"
    swept = sweep(tmp_path, search_protocol="mmdg-bench")
    assert [len(phase) for phase in trained] == [8, 2 * 2]
    assert len(swept.comparison.runs) == 6
    assert "other tables hold the chosen trial" in of_choices(swept).note
