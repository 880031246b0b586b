"""Learning rates by epoch: their values, every group's, and bit-equal resumption inside an epoch."""

from __future__ import annotations

import pytest
import torch
from fakes import MemoryDataset, Signalling, memory_settings
from torch import nn

from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.methods.base import ParameterGroup
from mbcd_cli.resolved import resolve
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.settings import OptimizerSettings
from mbcd_cli.training import train as command
from mbcd_cli.training.optimizer import build_optimizer, load_optimizer, optimizer_state, rate_factor, set_rates


def test_a_cosine_is_torchs():
    settings = OptimizerSettings(lr=1e-2, schedule="cosine", least_lr=1e-4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.lr)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15, eta_min=settings.least_lr)
    for epoch in range(15):
        ours = settings.lr * rate_factor(settings, epoch=epoch, epochs=15)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_a_tenth_after_each_drop_and_nothing_by_default():
    settings = OptimizerSettings(schedule="step", drops=(2, 4))
    assert [rate_factor(settings, epoch=e, epochs=5) for e in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert {rate_factor(OptimizerSettings(), epoch=e, epochs=5) for e in range(5)} == {1.0}
    with pytest.raises(SettingsError, match=r"least_lr: 0\.1 is above the learning rate"):
        resolve(sets=["optimizer.schedule=cosine", "optimizer.least_lr=0.1"])


def test_groups_keep_their_proportion_and_a_loaded_state_its_tensors():
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [ParameterGroup(weights[1:], lr=0.5)]
    settings = OptimizerSettings(name="sgd", lr=0.1)
    optimizer, other = (build_optimizer(weights, settings, groups=groups) for _ in range(2))
    set_rates(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.05])
    for group in other.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    kept = [group["lr"] for group in other.param_groups]
    load_optimizer(other, optimizer_state(optimizer))
    set_rates(other, 0.1)
    assert all(group["lr"] is rate for group, rate in zip(other.param_groups, kept, strict=True))
    assert [float(rate) for rate in kept] == pytest.approx([0.01, 0.05])


@pytest.mark.parametrize("schedule", [{"schedule": "cosine"}, {"schedule": "step", "drops": (1, 2)}])
def test_a_training_that_stops_inside_an_epoch_goes_on_to_the_same_bits(tmp_path, monkeypatch, schedule):
    torch.set_num_threads(1)
    settings = memory_settings(optimizer=schedule, training={"epochs": 3})

    def train(name, dataset=None, resume=False, tree=settings):
        command.train(tree, dataset or MemoryDataset(), run=tmp_path / name, resume=resume, overwrite=False)
        return load_checkpoint(tmp_path / name / "checkpoints/last.pt")

    whole = train("whole")
    with pytest.raises(RunError, match="Stopped by SIGTERM"):
        train("cut", Signalling(6))
    cut = train("cut", resume=True)
    constant = train("constant", tree=memory_settings(training={"epochs": 3}))
    for name, value in whole.student.items():
        assert torch.equal(value, cut.student[name]), name
    assert any(not torch.equal(value, constant.student[name]) for name, value in whole.student.items())
    last = whole.training["optimizer"]["param_groups"][0]["lr"]
    assert last == pytest.approx(1e-2 * rate_factor(settings.optimizer, epoch=2, epochs=3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_captured_update_reads_the_rate_of_its_epoch(name):
    settings = OptimizerSettings(name=name, lr=0.1, schedule="cosine")
    ends = []
    for captured in (False, True):
        weight = nn.Parameter(torch.ones(3, device="cuda"))
        optimizer = build_optimizer([weight], settings, capturable=True)
        weight.grad = torch.full_like(weight, 0.5)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.synchronize()
        step = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for epoch in range(3):
            set_rates(optimizer, rate_factor(settings, epoch=epoch, epochs=3))
            step()
        ends.append(weight.detach().cpu())
    assert torch.equal(*ends)
