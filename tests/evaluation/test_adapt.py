"""`mbcd adapt`: losses against plain float64 references, the runner against plain loops, and what it leaves alone."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import damage
import helpers
import numpy as np
import pytest
import torch
from commands import CUTS, run
from evaluation_cases import make_checkpoint, make_dataset, make_settings
from plain import pinned_logits
from torch import nn

from mbcd_cli.checksums import checksum
from mbcd_cli.encoders.staged import Tail
from mbcd_cli.errors import MbcdError, RunError
from mbcd_cli.evaluation import adapt as adapting
from mbcd_cli.evaluation.adapt import _Copy, adapt_run, adapted_predictions, batches_of
from mbcd_cli.evaluation.adaptation_rules import RULES, read_loss
from mbcd_cli.evaluation.report.evaluated import find_runs
from mbcd_cli.files import read_json
from mbcd_cli.integrity import examine
from mbcd_cli.model import MultiModalModel, build_model
from mbcd_cli.scoring.deployed import build_models
from mbcd_cli.settings import AdaptSettings

CPU = torch.device("cpu")


# ---- losses: numpy loops over clips, differentiated by complex steps (exact to the last digits)


def softmax(row):
    e = [np.exp(value) for value in row]
    return [value / sum(e) for value in e]


def plain_entropy(p):
    return -sum(value * np.log(value) for value in p)


def plain_balance(fused):
    p = [softmax(row) for row in fused]
    return plain_entropy(softmax([sum(column) for column in zip(*p, strict=True)]))


def plain_loss(rule: str, fused, unimodal, s: AdaptSettings):
    clips, classes = fused.shape
    p = [softmax(row) for row in fused]
    if rule == "tent":
        return sum(map(plain_entropy, p)) / clips
    if rule == "read":
        surest = [max(row, key=lambda value: value.real) for row in p]
        return sum(-m * np.log(m) for m in surest) / clips - plain_balance(fused)

    def share(row):
        return -sum(value * np.log(value + 1e-9) for value in row) / np.log(classes)

    h = [share(row) for row in p]
    w = [np.tanh(4 * (one - s.alpha)) for one in h]
    of = [[softmax(row) for row in logits] for logits in unimodal]
    total = sum(-a * b for a, b in zip(h, w, strict=True)) / clips
    pairs = list(combinations(of, 2))
    for one, other in pairs:
        for a, b, weight in zip(one, other, w, strict=True):
            norm = sum((x - y) * np.sign((x - y).real) for x, y in zip(a, b, strict=True))
            total += s.unimodal_weight * -norm * weight / clips / len(pairs)
    for rows in of:
        for a, weight in zip(rows, w, strict=True):
            total += s.unimodal_weight * -share(a) * weight / clips / len(of)
    return total - s.balance_weight * plain_balance(fused)


def by_complex_steps(function, values: np.ndarray) -> np.ndarray:
    out = np.empty(values.shape)
    for index in np.ndindex(values.shape):
        moved = values.astype(np.complex128)
        moved[index] += 1e-30j
        out[index] = function(moved).imag / 1e-30
    return out


@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("rule", list(RULES))
def test_losses_and_their_gradients(rule, modalities):
    s = AdaptSettings(rule=rule, alpha=0.7, unimodal_weight=0.4, balance_weight=0.3)
    rng = np.random.default_rng(0)
    stacked = rng.normal(size=(modalities + 1, 7, 5)) * 3
    tensors = torch.tensor(stacked, requires_grad=True)
    loss = RULES[rule].loss(tensors[0], {str(k): tensors[k + 1] for k in range(modalities)}, s)
    loss.backward()

    def plain(values):
        return plain_loss(rule, values[0], values[1:], s)

    assert loss.item() == pytest.approx(plain(stacked), abs=1e-12)
    np.testing.assert_allclose(tensors.grad.numpy(), by_complex_steps(plain, stacked), rtol=0, atol=1e-10)


def test_pinned_numbers():
    fused = pinned_logits(3).requires_grad_()
    unimodal = {"0": pinned_logits(0), "1": pinned_logits(1)}
    defaults = AdaptSettings()
    assert RULES["tent"].loss(fused, unimodal, defaults).item() == pytest.approx(0.604187052583, abs=1e-12)
    whole = read_loss(fused, unimodal, defaults)
    (gradient,) = torch.autograd.grad(whole, fused)
    assert gradient.norm().item() == pytest.approx(0.167745230780, abs=1e-12)
    assert whole.item() == pytest.approx(0.210258317079 - 0.692965350654, abs=1e-12)
    assert RULES["aeo"].loss(fused, unimodal, defaults).item() == pytest.approx(0.142770585032, abs=1e-12)


def test_logits_that_saturate_have_finite_gradients():
    fused = torch.tensor([[200.0, 0.0, -200.0], [0.0, 1.0, 2.0]], requires_grad=True)
    for rule in RULES.values():
        (gradient,) = torch.autograd.grad(rule.loss(fused, {"k": fused}, AdaptSettings()), fused)
        assert gradient.isfinite().all()


# ---- the runner: plain loops over the same batches, with torch's own optimizer


def with_adapt(settings, **changes):
    adapt = AdaptSettings(**{"batch_size": 5, "lr": 0.01, "dropout": False, **changes})
    return settings.model_copy(update={"adapt": adapt})


def plain_moved(model: nn.Module, rule: str) -> list[nn.Parameter]:
    """Sets modes; what moves."""
    model.eval()
    if rule == "read":
        return [*model.fused_head[0].parameters()]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    for module in norms:  # statistics of the batch alone, as TENT's code has them
        module.track_running_stats, module.running_mean, module.running_var = False, None, None
    if rule == "tent":
        return [value for module in norms for value in module.parameters()]
    return [*model.parameters()]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("reset", ["target", "batch", "never"])
@pytest.mark.parametrize("rule", list(RULES))
def test_the_runner_is_a_plain_loop(settings, dataset, rule, reset, steps):
    """`batch`: one step (or two) from the checkpoint for each batch, by a model built anew."""
    settings = with_adapt(settings, rule=rule, reset=reset, steps=steps)
    checkpoint = make_checkpoint(settings, dataset)
    found = adapt_run(settings, dataset, {"best": checkpoint}, device=CPU)
    decay = {"aeo": 1e-4}.get(rule, 0.0)
    assert (found.settings["lr"], found.settings["weight_decay"]) == (0.01, decay)

    def begin():
        model = build_models(settings, dataset, checkpoint, device=CPU)["teacher"]
        moved = plain_moved(model, rule)
        return model, torch.optim.Adam([p.requires_grad_() for p in moved], lr=0.01, weight_decay=decay)

    def plainly(model, clips):
        return model({n: (v[clips],) for n, v in dataset.arrays.items()})

    model, optimizer = begin()
    figures = {"source": [], "target": []}
    for domain, name in enumerate(dataset.domains):
        clips = np.flatnonzero((dataset.domain == domain) & (dataset.split == 1))
        if reset == "target":
            model, optimizer = begin()
        parts = batches_of(clips, domain, settings.adapt)
        assert found.batches[name] == [len(part) for part in parts]
        for part in parts:
            if reset == "batch":
                model, optimizer = begin()
            first = plainly(model, part)[0].detach()
            for _ in range(steps):
                fused, unimodal = plainly(model, part)
                optimizer.zero_grad()
                RULES[rule].loss(fused, unimodal, settings.adapt).backward()
                optimizer.step()
            after = plainly(model, part)[0].detach()
            clip_set = "target" if name == "street" else "source"
            figures[clip_set].append((first, after, torch.tensor(dataset.labels[part])))
    for clip_set, parts in figures.items():
        labels = torch.cat([part[2] for part in parts])
        for index, when in enumerate((found.before, found.after)):
            logits = torch.cat([part[index] for part in parts])
            expected = nn.functional.cross_entropy(logits.double(), labels).item()
            # A bias before a batch norm has no gradient but rounding, and Adam moves it by its whole step.
            assert when[clip_set]["fused"].loss == pytest.approx(expected, rel=1e-5)
            assert when[clip_set]["fused"].top1 == (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("rule", list(RULES))
def test_what_moves_and_what_comes_back(settings, dataset, rule):
    settings = with_adapt(settings, rule=rule, dropout=True)
    checkpoint = make_checkpoint(settings, dataset)
    kept = {key: value.clone() for key, value in checkpoint.student.items()}
    model = build_models(settings, dataset, checkpoint, device=CPU)["teacher"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copy = _Copy(model, RULES[rule], settings.adapt.model_copy(update={"weight_decay": 0.0}), precision="float32")
    state = torch.get_rng_state()
    streams = [("street", batches_of(np.arange(20), 2, settings.adapt))]
    adapted_predictions(copy, dataset, streams, device=CPU)
    assert torch.get_rng_state().equal(state)
    moved = {key for key, value in model.named_parameters() if not value.equal(before[key])}
    parts = {
        "tent": {key for key in before if ".layer1.1." in key or ".layer2.1." in key},
        "read": {"fused_head.0.weight", "fused_head.0.bias"},
        "aeo": set(before),
    }[rule]
    assert moved == {key for key, _ in model.named_parameters()} & parts == set(copy.moved)
    copy.reset()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert copy.optimizer.state == {}
    assert all(value.equal(checkpoint.student[key]) for key, value in kept.items())


def test_read_moves_all_of_a_linear_fused_head(settings, dataset):
    linear = settings.model.model_copy(update={"fused_head": "linear"})
    model = build_model(dataset.modalities, settings=linear, classes=dataset.classes)
    moved = RULES["read"].moved(model, settings.adapt)
    assert moved == {f"fused_head.{key}": value for key, value in model.fused_head.named_parameters()}


def test_dropout_of_a_batch_depends_on_nothing_before_it(settings, dataset):
    """With reset = batch the second batch alone gives what it gives after the first."""
    settings = with_adapt(settings, rule="aeo", reset="batch", dropout=True, weight_decay=0.0)
    model = build_models(settings, dataset, make_checkpoint(settings, dataset), device=CPU)["teacher"]
    copy = _Copy(model, RULES["aeo"], settings.adapt, precision="float32")
    first, second = np.split(np.arange(20), 2)
    both = adapted_predictions(copy, dataset, [("street", [first, second])], device=CPU)
    other = adapted_predictions(copy, dataset, [("street", [first[:4], second])], device=CPU)
    assert both["after"].fused[10:].equal(other["after"].fused[4:])
    assert not both["before"].fused[10:].equal(both["after"].fused[10:])
    without = settings.adapt.model_copy(update={"dropout": False})
    plain = adapted_predictions(
        _Copy(model, RULES["aeo"], without, precision="float32"), dataset, [("street", [first, second])], device=CPU
    )
    assert not plain["before"].fused.equal(both["before"].fused)


def test_order_and_last_batch():
    clips = np.arange(11) * 3
    of = {seed: batches_of(clips, 1, AdaptSettings(batch_size=5, seed=seed)) for seed in (0, 1)}
    assert [len(part) for part in of[0]] == [5, 6]
    assert sorted(np.concatenate(of[0])) == clips.tolist()
    assert np.concatenate(of[0]).tolist() != np.concatenate(of[1]).tolist()
    assert [len(part) for part in batches_of(clips, 1, AdaptSettings(batch_size=4))] == [4, 4, 3]
    assert [len(part) for part in batches_of(clips, 1, AdaptSettings(batch_size=10))] == [11]
    assert [len(part) for part in batches_of(clips[:2], 1, AdaptSettings())] == [2]
    with pytest.raises(MbcdError, match="one clip"):
        batches_of(clips[:1], 1, AdaptSettings())


def test_a_model_without_normalisation_is_refused_by_name(settings, dataset, monkeypatch):
    monkeypatch.setattr(nn, "BatchNorm1d", lambda dim: nn.Identity())
    checkpoint = make_checkpoint(settings, dataset)
    with pytest.raises(MbcdError, match="video, audio have none"):
        adapt_run(with_adapt(settings), dataset, {"best": checkpoint}, device=CPU)


def test_layer_norms_move_in_eval_mode(settings, dataset, monkeypatch):
    monkeypatch.setattr(nn, "BatchNorm1d", nn.LayerNorm)
    settings = with_adapt(settings, reset="batch")
    found = adapt_run(settings, dataset, {"best": make_checkpoint(settings, dataset)}, device=CPU)
    plain = found.unadapted.deployed_sets
    for clip_set, heads in found.before.items():
        assert heads["fused"].loss == pytest.approx(plain[clip_set]["fused"].loss, rel=1e-6)
        assert heads["fused"].confusion == plain[clip_set]["fused"].confusion
    assert all(".layer" in name for name in found.moved)


def test_frozen_stages_of_a_tail_stay_as_they_are():
    stages = {"a": nn.Sequential(nn.BatchNorm1d(6)), "b": nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))}
    settings = make_settings()
    model = MultiModalModel({"video": Tail(stages, dim=6, frozen=["a"])}, settings=settings.model, classes=3)
    for rule in RULES.values():
        moved = rule.moved(model, AdaptSettings())
        assert not any(name.startswith("tails.video.a") for name in moved)
        assert not model.tails["video"].a.training
    assert set(RULES["tent"].moved(model, AdaptSettings())) == {"tails.video.b.1.weight", "tails.video.b.1.bias"}


def test_without_a_target():
    settings = with_adapt(make_settings(target_domain=None, method="erm"))
    dataset = make_dataset(settings)
    found = adapt_run(settings, dataset, {"last": make_checkpoint(settings, dataset, teacher=False)}, device=CPU)
    assert set(found.before) == set(found.after) == {"source"}
    assert list(found.batches) == ["studio", "tilted", "street"]


def test_outputs_that_are_not_finite_are_told(settings, dataset):
    settings = with_adapt(settings, rule="aeo", lr=1e30)
    found = adapt_run(settings, dataset, {"best": make_checkpoint(settings, dataset)}, device=CPU)
    assert any("it diverged" in text for text in found.unadapted.warnings)


# ---- the command

QUICK = ("--set", "adapt.batch_size=2")


@pytest.mark.parametrize("rule", list(RULES))
def test_the_run_keeps_its_bytes_and_the_same_command_gives_the_same(home, kept, rule):
    folder = home / "run"
    done = run("adapt", folder, "--rule", rule, *QUICK, "--json").data
    made = damage.Snapshot.of(folder / "adaptation").files
    assert {path.name for path in made} == {"adaptation.json", "adaptation.csv", "adaptation.md"}
    assert {path: path.read_bytes() for path in kept["run"].files} == kept["run"].files
    assert examine(folder).faults == []
    results = read_json(folder / "adaptation" / rule / "adaptation.json")
    assert results["uses"] == "target inputs at test time"
    assert results["unadapted"]["checkpoints"] == {"best": checksum(folder / "checkpoints/best.pt")}
    assert results["unadapted"]["headline"] == read_json(folder / "results.json")["headline"]
    (table,) = done["tables"]
    assert [row[1].endswith("step (uses target inputs)") for row in table["rows"]] == [False, True, True] * 2
    shown = run("adapt", folder, "--rule", rule, *QUICK).stdout
    assert "uses target inputs at test time is not to be compared" in " ".join(shown.split())
    assert made == damage.Snapshot.of(folder / "adaptation").files


def test_damage_is_told_and_tables_of_runs_do_not_see_it(home, kept, tmp_path):
    folder = home / "run"
    run("adapt", folder, *QUICK)
    assert find_runs([f"{home}/run/**"]) == ([folder], [])
    run("evaluate", "--runs", f"{home}/run/**", "--output", tmp_path / "comparison")
    assert "tent" not in (tmp_path / "comparison/comparison.md").read_text()
    table = folder / "adaptation/tent/adaptation.csv"
    table.write_bytes(table.read_bytes().replace(b"unadapted", b"unadopted"))
    assert examine(folder).faults == [table]


def test_several_runs_are_a_table_over_seeds(home, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = [part for one in (*helpers.SMALL, *CUTS, "training.batch_size=4") for part in ("--set", one)]
    for seed, own in ((1, ()), (2, ("--set", "adapt.steps=2"))):
        words = ("--target-domain", "gamma", "--cache-dir", home / "cache", "--epochs", 1, "--seed", seed)
        run("train", "--dataset", "tiny", *words, "--run", tmp_path / f"runs/s{seed}", *sets, *own)
    assert "(adapt.steps): one table" in " ".join(run("adapt", tmp_path / "runs", *QUICK, code=1).stderr.split())
    assert not [*tmp_path.rglob("adaptation.json")], "none is adapted where all are refused"
    asked = (*QUICK, "--set", "adapt.steps=1")
    with monkeypatch.context() as patched:
        patched.setattr(adapting, "adapt_run", lambda *_, **__: (_ for _ in ()).throw(RunError("no norm", "use read")))
        assert f"{tmp_path}/runs/s1: no norm" in run("adapt", tmp_path / "runs", *asked, code=1).stderr.replace(
            "\n", ""
        )
    run("adapt", tmp_path / "runs", "--rule", "read", *asked)
    place = tmp_path / "adaptation/read"
    found = [read_json(tmp_path / f"runs/s{seed}/adaptation/read/adaptation.json") for seed in (1, 2)]
    told = read_json(place / "adaptation.json")
    (table,) = told["tables"]
    assert table["columns"] == ["method", "prediction", "gamma", "average", "against unadapted"]
    assert [row[1] for row in table["rows"]] == [
        "unadapted",
        *(f"read, {w} the step (uses target inputs)" for w in ("before", "after")),
    ]
    after = [100 * one["after"]["target"]["fused"]["top1"] for one in found]
    plain = [100 * one["unadapted"]["headline"]["top1"]["fused"] for one in found]
    assert table["rows"][2][2]["value"] == pytest.approx(np.mean(after))
    assert table["rows"][2][2]["std"] == pytest.approx(np.std(after, ddof=1))
    assert table["rows"][2][4]["value"] == pytest.approx(np.mean(after) - np.mean(plain))
    assert set(told["files"]) == {f"{table['name']}.csv", "adaptation.md"}
    assert examine(place).faults == []
    # One run, written elsewhere.
    run("adapt", tmp_path / "runs/s1", "--rule", "read", *QUICK, "--output", tmp_path / "one")
    one = tmp_path / "one/read/adaptation.json"
    assert one.read_bytes() == (tmp_path / "runs/s1/adaptation/read/adaptation.json").read_bytes()


def test_an_interruption_leaves_the_earlier_results(home, kept, monkeypatch):
    run("adapt", home / "run", *QUICK)
    before = damage.Snapshot.of(home / "run").files
    monkeypatch.setattr(adapting, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    run("adapt", home / "run", *QUICK, "--set", "adapt.lr=1", code=130)
    assert damage.Snapshot.of(home / "run").files == before


def test_what_is_refused(home, kept, tmp_path):
    folder: Path = home / "run"

    def refused(*words: object, code: int = 1) -> str:
        return run("adapt", *words, code=code).stderr

    assert "a batch of one clip" in refused(folder, "--set", "adapt.batch_size=1")
    assert "adapt.rule" in refused(folder, "--rule", "memo")
    assert "optimizer.lr" in refused(folder, "--set", "optimizer.lr=1")
    assert "There is no run" in refused(tmp_path)
    (folder / "done").unlink()
    assert "not trained to its end" in refused(folder)
    assert list(folder.rglob("adaptation.json")) == []


def test_a_sealed_target_is_refused_until_its_look_is_in_the_ledger(home, tmp_path):
    sets = (*helpers.SMALL, *CUTS, "training.batch_size=4", "dataset.seal_target=true")
    words = [part for one in sets for part in ("--set", one)]
    folder = tmp_path / "runs/sealed"
    where = ("--dataset", "tiny", "--target-domain", "gamma", "--cache-dir", home / "cache")
    run("train", *where, "--epochs", 1, "--run", folder, *words)
    refused = run("adapt", folder, *QUICK, code=1).stderr
    assert "is sealed" in refused
    assert f"mbcd reveal {folder}" in refused
    run("adapt", folder, *QUICK, "--set", "dataset.seal_target=false", code=1)
    assert list(folder.rglob("adaptation.json")) == []
    run("reveal", folder)
    run("adapt", folder, *QUICK)
    assert (folder / "adaptation/tent/adaptation.json").is_file()
