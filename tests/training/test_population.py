"""Many trainings at once: what each leaves is what it would have left alone, whatever becomes of the others."""

from __future__ import annotations

import errno
import gc
import os
import signal
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import MemoryDataset, memory_settings

from mbcd_cli.errors import FileError, RunError, StoppedError
from mbcd_cli.files import read_records
from mbcd_cli.methods.base import Method, total
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.say import SILENT, Say
from mbcd_cli.training.optimizer import set_rates
from mbcd_cli.training.population import StackedStep, StackingError
from mbcd_cli.training.static_step import StaticStep
from mbcd_cli.training.subject import Subject, weights
from mbcd_cli.training.together import Wanted, train_together
from mbcd_cli.training.train import train
from mbcd_cli.training.trainer import Trainer


def settings_of(seed, *, target="c", method="mbcd", optimizer="adam", hidden=None, device="cpu", **training):
    sources = tuple(domain for domain in "abc" if domain != target)
    chosen = {"seed": seed, "target_domain": target, "source_domains": sources, **training}
    model = {"dropout": 0.3, **({} if hidden is None else {"hidden": hidden})}
    groups = {"optimizer": {"name": optimizer}, "model": model}
    told = method if isinstance(method, dict) else {"name": method}
    return memory_settings(training=chosen, method=told, runtime={"device": device}, **groups)


def together(folder, settings, *, dataset=None, width=8, say=SILENT, told=SILENT):
    """Trained into `folder`/0, 1, ...; what each ended with."""
    outcomes = {}
    wanted = [Wanted(one, folder / str(number), told) for number, one in enumerate(settings)]
    train_together(
        wanted,
        dataset or MemoryDataset(),
        width=width,
        ended=lambda one, outcome: outcomes.update({one.run.name: outcome}),
        say=say,
    )
    return outcomes


def alone(run, settings, dataset=None):
    return train(settings, dataset or MemoryDataset(), run=run, resume=False, overwrite=False)


@pytest.mark.parametrize(
    ("method", "optimizer"), [("erm", "adam"), ("mbcd", "adam"), ("swad", "adam"), ("jat", "adam"), ("erm", "sgd")]
)
def test_members_leave_what_they_would_have_left_alone(tmp_path, method, optimizer, monkeypatch):
    monkeypatch.setattr("mbcd_cli.training.curves.plot_run", lambda *args: [])
    members = [
        settings_of(seed, target=target, method=method, optimizer=optimizer) for seed, target in enumerate("cac")
    ]
    outcomes = together(tmp_path / "population", members, width=2)
    for number, settings in enumerate(members):
        summary = alone(tmp_path / str(number), settings)
        assert outcomes[str(number)].steps == summary.steps
        assert outcomes[str(number)].best.epoch == summary.best.epoch
        mine, theirs = tmp_path / "population" / str(number), tmp_path / str(number)
        for file in ("metrics.jsonl", "steps.jsonl", "checkpoints/last.pt", "checkpoints/best.pt"):
            assert (mine / file).read_bytes() == (theirs / file).read_bytes(), file


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_members_on_a_gpu_do_what_they_do_alone(tmp_path):
    """Both captured; the bits of products differ there."""
    members = [settings_of(seed, device="cuda", epochs=3) for seed in range(3)]
    lines = []
    together(tmp_path / "population", members, say=Say(lines.append))
    assert not [line for line in lines if "graph" in line or "stacked" in line]
    for number, settings in enumerate(members):
        alone(tmp_path / str(number), settings)
        files = [folder / str(number) / "checkpoints" / "last.pt" for folder in (tmp_path / "population", tmp_path)]
        one, other = (load_checkpoint(file).student for file in files)
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_optimizers_do_what_they_do_alone_and_keep_their_moments_where_members_are_stacked_anew(optimizer):
    subject = Subject.of("ema")

    def trained(together):
        members = []
        for seed in range(3):
            members.append(subject.training(seed=seed, optimizer=optimizer))
            members[-1].randomness.own_globals()
            if not together:
                for number in range(6):
                    members[-1].step(subject.batch(10 * seed + number))
        if together:
            for begin in (0, 3):
                stacked = StackedStep(members)
                for number in range(begin, begin + 3):
                    stacked([subject.batch(10 * seed + number) for seed in range(3)])
                stacked.release()
        return [weights(member.step) for member in members]

    for one, other in zip(trained(True), trained(False), strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=1e-8)


def test_on_static_buffers_a_population_does_the_same():
    """As on a GPU, where its step is captured in a graph: there `mbcd check method` compares the two."""
    subject = Subject.of("mbcd")

    def trained(static):
        members = []
        for seed in range(3):
            member = subject.training(seed=seed)
            member.randomness.own_globals()
            run_step = StaticStep(member.step, draws=[member.randomness], device=torch.device("cpu"), required=True)
            members.append(replace(member, run_step=run_step if static else None))
        stacked = StackedStep(members)
        vectors = [stacked([subject.batch(10 * seed + number) for seed in range(3)]) for number in range(5)]
        assert isinstance(stacked._run, StaticStep) == static
        return [vector for each in vectors for vector in each], [weights(member.step) for member in members]

    (figures, one), (others, other) = trained(True), trained(False)
    assert all(map(torch.equal, figures, others))  # at the end: nothing returned lies in a buffer
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_captured_population_gives_every_member_its_own_learning_rate():
    """Rates that change lie on the device, where nobody looks at them: of one run only the first member's are read."""
    subject = Subject.of("erm")
    members = []
    for seed in range(2):
        member = subject.training(seed=seed)
        member.randomness.own_globals()
        for group in member.step.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        how = {"draws": [member.randomness], "device": torch.device("cpu"), "required": True}
        members.append(replace(member, run_step=StaticStep(member.step, **how)))
    stacked = StackedStep(members)

    def moved(numbers):
        before = [weights(member.step) for member in members]
        for number in numbers:
            stacked([subject.batch(10 * seed + number) for seed in range(2)])
        after = [weights(member.step) for member in members]
        key = "student.fused_head.weight" if "student.fused_head.weight" in before[0] else next(iter(before[0]))
        return [not torch.equal(one[key], other[key]) for one, other in zip(before, after, strict=True)]

    assert moved(range(2)) == [True, True]
    captured = stacked._run
    for member in members:
        set_rates(member.step.optimizer, 0.5)
    assert moved(range(2, 4)) == [True, True]
    assert stacked._run is captured, "the same rate for both is read by the same graph"
    set_rates(members[1].step.optimizer, 0.0)
    assert moved(range(4, 6)) == [True, False]


def test_a_population_that_is_let_go_leaves_nothing():
    """Weights, gradients and graphs of the one before would lie beside those of the next."""
    subject = Subject.of("erm")
    member = subject.training(seed=0)
    member.randomness.own_globals()
    how = {"draws": [member.randomness], "device": torch.device("cpu"), "required": True}
    for run_step in (None, StaticStep(member.step, **how)):
        stacked = StackedStep([replace(member, run_step=run_step)])
        stacked([subject.batch(0)])
        stacked.release()
        gone = weakref.ref(stacked)
        gc.collect()
        gc.disable()
        try:
            del stacked
            assert gone() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_member_that_goes_on_beside_others_leaves_the_same_bytes(tmp_path, monkeypatch, optimizer):
    """The population is stacked anew when one ends (or diverges, amid an epoch) and another begins; what its optimizer
    and average hold goes with a member."""
    monkeypatch.setattr("mbcd_cli.training.curves.plot_run", lambda *args: [])
    members = [settings_of(seed, method="ema", optimizer=optimizer, epochs=n) for seed, n in enumerate((1, 3, 2, 2))]
    steep = members[3].optimizer.model_copy(update={"lr": 1e30})
    members[3] = members[3].model_copy(update={"optimizer": steep})
    outcomes = together(tmp_path / "population", [members[3], *members[:3]], width=3)
    assert "is not finite" in outcomes["0"].message
    for number, settings in enumerate(members[:3], start=1):
        alone(tmp_path / str(number), settings)
        mine, theirs = tmp_path / "population" / str(number), tmp_path / str(number)
        for file in ("metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.pt"):
            assert (mine / file).read_bytes() == (theirs / file).read_bytes(), file


def test_an_encoder_moves_its_factor_times_as_far():
    class Paced(Method):
        """The first modality's encoder moves three times as far."""

        def gradients(self, batch):
            figures = super().gradients(batch)
            factors = torch.ones_like(figures["accuracy"])
            factors[0] = 3.0
            self.context.modulate(factors, of="update")
            return figures

    for optimizer in ("adam", "adamw", "sgd"):
        moved = []
        for kind in (Method, Paced):
            training = Subject(kind).training(dropout=0.0, optimizer=optimizer)
            before = weights(training.step)
            training.step(Subject(kind).batch(0))
            moved.append({name: value - before[name] for name, value in weights(training.step).items()})
        for name, change in moved[0].items():
            faster = name.startswith("student.tails.m0.") and name.endswith(("weight", "bias"))
            expected, tolerance = (3 * change, 1e-15) if faster else (change, 0.0)
            torch.testing.assert_close(moved[1][name], expected, rtol=0, atol=tolerance, msg=name)


def test_a_member_that_diverges_stops_alone(tmp_path):
    dataset = MemoryDataset()
    for name in dataset.training:
        dataset.training[name][dataset.domain == 0] = float("inf")
    outcomes = together(
        tmp_path, [settings_of(0, target="a"), settings_of(1), settings_of(2, target="a")], dataset=dataset
    )
    assert isinstance(outcomes["1"], RunError)
    assert "not finite" in outcomes["1"].message
    assert [(tmp_path / str(number) / "done").is_file() for number in range(3)] == [True, False, True]


UPDATED = {"name": "ogm", "modulate": "update", "alpha": 2.0}


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("mbcd", "adam"), ("mbcd", "adamw"), ("mbcd", "sgd"), (UPDATED, "adam")],
)
def test_stopped_and_gone_on_with_a_population_ends_in_the_same_bits(tmp_path, method, optimizer):
    members = [settings_of(seed, method=method, optimizer=optimizer, epochs=3) for seed in range(3)]
    together(tmp_path / "whole", members)

    lines = []

    def stop(line):
        lines.append(line)
        if line.startswith("epoch 2/3") and len([one for one in lines if one.startswith("epoch 2/3")]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    outcomes = together(tmp_path / "cut", members, told=Say(stop))
    assert all("Stopped by SIGTERM" in outcome.message for outcome in outcomes.values())
    together(tmp_path / "cut", members)
    for number in "012":
        whole, cut = tmp_path / "whole" / number, tmp_path / "cut" / number
        for log in ("metrics.jsonl", "steps.jsonl"):
            assert (whole / log).read_bytes() == (cut / log).read_bytes()
        one, other = (load_checkpoint(run / "checkpoints/last.pt") for run in (whole, cut))
        assert all(torch.equal(value, other.student[name]) for name, value in one.student.items())
        assert all(torch.equal(value, other.teacher[name]) for name, value in (one.teacher or {}).items())


def test_checkpoints_wait_for_the_disk_together_and_one_that_cannot_be_written_ends_its_member_alone(
    tmp_path, monkeypatch
):
    fsync, names = os.fsync, []

    def failing(handle):
        name = str(Path(f"/proc/self/fd/{handle}").readlink())
        names.append(name)
        if "/1/checkpoints/.last.pt" in name:
            raise OSError(errno.EIO, "no answer")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    outcomes = together(tmp_path, [settings_of(seed) for seed in range(3)])
    assert isinstance(outcomes["1"], FileError)
    assert outcomes["1"].message.startswith(f"{tmp_path}/1/checkpoints/last.pt cannot be written")
    assert "--run" in outcomes["1"].remedy
    assert not any((tmp_path / "1/checkpoints").glob("*last*"))
    assert [(tmp_path / str(number) / "done").is_file() for number in range(3)] == [True, False, True]
    first = [name for name in names if "/checkpoints" in name]
    first = first[: first.index(next(name for name in first if name.endswith("/checkpoints")))]
    assert {name.removeprefix(f"{tmp_path}/")[0] for name in first if "last.pt" in name} == set("012")


def test_a_signal_while_they_are_validated_one_by_one_stops_them_all(tmp_path, monkeypatch):
    members = [settings_of(seed) for seed in range(2)]
    together(tmp_path / "whole", members)
    predicted, asked = Trainer.predicted, []

    def stopping(self, validation):
        asked.append(self)
        if len(asked) == 3:  # the second member's turn, of the target's clips after the sources'
            os.kill(os.getpid(), signal.SIGTERM)
        return predicted(self, validation)

    monkeypatch.setattr(Trainer, "predicted", stopping)
    outcomes = together(tmp_path / "cut", members)
    assert [type(outcomes[number]) for number in "01"] == [StoppedError] * 2
    together(tmp_path / "cut", members)
    for number in "01":
        for log in ("metrics.jsonl", "steps.jsonl"):
            assert (tmp_path / "whole" / number / log).read_bytes() == (tmp_path / "cut" / number / log).read_bytes()


def test_gradients_that_are_others_in_a_population_are_told():
    class Doubled(Method):
        def gradients(self, batch):
            figures = super().gradients(batch)
            for parameter in self.context.model.parameters():
                if parameter.requires_grad:  # never, inside vmap
                    self.context.set_gradient(parameter, 2 * self.context.gradient(parameter))
            return figures

    subject = Subject(Doubled)
    members = [subject.training(seed=seed) for seed in range(2)]
    for member in members:
        member.randomness.own_globals()
    stacked = StackedStep(members)
    with pytest.raises(StackingError, match="not those of a training alone"):
        stacked([subject.batch(seed) for seed in range(2)])


def test_what_cannot_be_stacked_trains_one_after_another(tmp_path, monkeypatch):
    def gradients(self, batch):
        out = self(batch)
        terms = self.losses(batch, out)
        loss = total(terms)
        loss.backward()
        return self.figures(batch, out, loss, terms)

    monkeypatch.setattr(Method, "gradients", gradients)
    monkeypatch.setattr("mbcd_cli.training.curves.plot_run", lambda *args: [])
    lines = []
    outcomes = together(tmp_path, [settings_of(seed, method="erm") for seed in range(2)], say=Say(lines.append))
    assert any("cannot be stacked" in line for line in lines)
    assert [outcomes[number].steps for number in "01"] == [8, 8]


def test_what_a_method_refuses_is_told_of_every_member(tmp_path):
    members = [
        memory_settings(training={"seed": seed, "source_domains": ("a",)}, method={"name": "coral"}) for seed in (0, 1)
    ]
    outcomes = together(tmp_path, members)
    assert ["compares source domains" in outcome.message for outcome in outcomes.values()] == [True, True]


def test_a_step_that_fails_in_the_midst_goes_on_from_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr("mbcd_cli.training.curves.plot_run", lambda *args: [])
    whole, taken = StackedStep.__call__, []

    def failing(self, batches):
        taken.append(1)
        if len(taken) == 6:  # of 8: an epoch has 4
            raise RuntimeError("out of something")
        return whole(self, batches)

    monkeypatch.setattr(StackedStep, "__call__", failing)
    lines = []
    outcomes = together(tmp_path, [settings_of(seed) for seed in range(2)], say=Say(lines.append))
    assert any("one after another: out of something" in line for line in lines)
    assert [outcomes[number].steps for number in "01"] == [8, 8]
    assert [record["epoch"] for record in read_records(tmp_path / "0/metrics.jsonl")] == [1, 2]


def test_a_signal_stops_those_that_go_on_one_after_another_too(tmp_path, monkeypatch):
    def failing(self, batches):
        raise RuntimeError("out of something")

    monkeypatch.setattr(StackedStep, "__call__", failing)
    stop = Say(lambda line: line.startswith("epoch") and os.kill(os.getpid(), signal.SIGTERM))
    outcomes = together(tmp_path, [settings_of(seed, epochs=3) for seed in range(2)], told=stop)
    assert [*map(type, outcomes.values())] == [StoppedError], "the second one did not begin again"


@pytest.mark.parametrize("subject", [Subject.of("ema"), Subject.of("ogm", {"modulate": "update", "alpha": 2.0})])
def test_what_a_member_rounds_to_depends_on_nothing_beside_it(subject):
    def weights_of_the_first(shrunk):
        members = [subject.training(seed=seed, shrunk=factor) for seed, factor in enumerate(shrunk)]
        for member in members:
            member.randomness.own_globals()
            member.step.model.float()
            if member.step.average is not None:
                member.step.average.model.float()
        stacked = StackedStep(members)
        for number in range(6):
            batches = [subject.batch(10 * seed + number) for seed in range(3)]
            single = [{name: tuple(p.float() for p in parts) for name, parts in b.inputs.items()} for b in batches]
            stacked([replace(b, inputs=inputs) for b, inputs in zip(batches, single, strict=True)])
        assert len(stacked._alike) == len(set(shrunk))
        moments = members[0].step.optimizer.state_dict()["state"]
        return [*members[0].step.model.state_dict().values(), *(v for one in moments.values() for v in one.values())]

    together, apart = weights_of_the_first((1.0, 1.0, 1.0)), weights_of_the_first((1.0, 0.9, 0.8))
    assert all(map(torch.equal, together, apart))
