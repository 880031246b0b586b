"""Methods that read clips before an epoch: stopped anywhere they end in the same bits, and alike in a population."""

from __future__ import annotations

import pytest
import torch
from fakes import MemoryDataset, Signalling, memory_settings

from mbcd_cli.errors import StoppedError
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.training.together import Wanted, train_together
from mbcd_cli.training.train import train

METHODS = {
    "pmr": {"alpha": 2.0},
    "d-and-r": {"after": [1, 2]},
    "g-blending": {"epochs": 2},
    "mbcd": {"reliability": {"by": "left_out"}},
}


def settings_of(method, **training):
    return memory_settings(
        method={"name": method, **METHODS[method]},
        average={"kind": "ema"},
        training={"epochs": 2, **training},
        model={"dropout": 0.3},
    )


def trained(run, settings, dataset=None, *, resume=False):
    train(settings, dataset or MemoryDataset(), run=run, resume=resume, overwrite=False)
    return load_checkpoint(run / "checkpoints/last.pt")


def same(one, other):
    for state, its in ((one.student, other.student), (one.teacher, other.teacher)):
        assert all(torch.equal(value, its[name]) for name, value in state.items())
    own, others = one.training["method"], other.training["method"]
    assert all(torch.equal(value, others[name]) for name, value in own.items())


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("mbcd_cli.training.curves.plot_run", lambda *args: [])


@pytest.mark.parametrize("method", METHODS)
def test_stopped_between_epochs_and_within_them_it_ends_in_the_same_bits(tmp_path, method):
    settings = settings_of(method)
    whole, counting = trained(tmp_path / "whole", settings), Signalling(10**6)
    trained(tmp_path / "counted", settings, counting)
    batches = 10**6 - counting.left  # of trainings and of what is read between their epochs
    assert batches >= 8
    for at in (1, batches // 2, batches - 2):
        run = tmp_path / str(at)
        with pytest.raises(StoppedError):
            trained(run, settings, Signalling(at))
        same(trained(run, settings, resume=True), whole)
        for log in ("metrics.jsonl", "steps.jsonl"):
            assert (run / log).read_bytes() == (tmp_path / "whole" / log).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_members_of_a_population_read_what_they_would_read_alone(tmp_path, method):
    members = [settings_of(method, seed=seed) for seed in range(2)]
    failed = []
    wanted = [Wanted(one, tmp_path / "together" / str(k)) for k, one in enumerate(members)]
    told = lambda one, outcome: failed.append(outcome) if isinstance(outcome, Exception) else None  # noqa: E731
    train_together(wanted, MemoryDataset(), width=2, ended=told)
    assert not failed
    for k, settings in enumerate(members):
        one = load_checkpoint(tmp_path / "together" / str(k) / "checkpoints/last.pt")
        other = trained(tmp_path / str(k), settings)
        for state, its in ((one.student, other.student), (one.training["method"], other.training["method"])):
            for name, value in state.items():
                torch.testing.assert_close(value, its[name], rtol=0, atol=5e-3, msg=name)
