"""A method from a file with all that a method may have, through a whole training: modules, views, figures, resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from fakes import MemoryDataset, Signalling, memory_settings

from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.training import train as command
from mbcd_cli.training.assemble import assemble
from mbcd_cli.training.dry_run import dry_run

SOURCE = '''
import torch
from torch import nn
from mbcd_cli.methods.base import Alarm, Method, Panel, ParameterGroup, Shown, Term
from mbcd_cli.settings import MethodSettings


class Settings(MethodSettings):
    weight: float = 0.1
    """Weight of the agreement."""


class Full(Method):
    """Agreement of two views."""

    Settings = Settings
    views = 2
    average = "sma"
    ticker = ("agreement", "spread")
    alarms = (Alarm("spread", "wide", 0.0, "{modality} spreads by {value:.1f}"),)

    @classmethod
    def panels(cls, settings):
        return (Panel("spread", "Spread", {"spread": Shown("spread", axis="spread")}),)

    def __init__(self, settings, context):
        super().__init__(settings, context)
        dims = context.model.dims
        self.project = nn.ModuleDict({n: nn.Sequential(nn.Linear(d, 4), nn.BatchNorm1d(4)) for n, d in dims.items()})
        self.target = context.average.follow(self.project)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def parameter_groups(self):
        return [ParameterGroup([layer[0].bias for layer in self.project.values()], weight_decay=0.0)]

    def losses(self, batch, out):
        assert torch.equal(batch.clips[0::2], batch.clips[1::2])
        apart = []
        for name, h in out.features.items():
            z, target = self.project[name](h), self.target[name](h).detach()
            apart.append((z[0::2] - target[1::2]).square().mean())
        return super().losses(batch, out) | {"agreement": Term(torch.stack(apart).mean(), self.settings.weight)}

    def gradients(self, batch):
        figures = super().gradients(batch)
        return figures | {"spread": torch.stack([figures["agreement"]] * len(self.context.model.modalities))}

    def after_update(self):
        self.updates += 1
'''


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "full.py").write_text(SOURCE)
    method = {"name": f"{tmp_path / 'full.py'}:Full"}
    return memory_settings(training={"epochs": 2}, method=method, average={"start": 2})


def train(run, settings, dataset=None, resume=False):
    return command.train(settings, dataset or MemoryDataset(), run=run, resume=resume, overwrite=False)


def test_own_modules_are_trained_saved_and_resumed_but_never_deployed(tmp_path, settings):
    torch.set_num_threads(1)
    summary = train(tmp_path / "whole", settings)
    assert summary.deployed == "teacher"
    assert "plots/spread.png" in summary.plots
    assert any("left spreads by" in warning for warning in summary.warnings)
    record = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[-1])
    assert {"agreement", "ce_fused", "total"} <= record["train"].keys()
    with pytest.raises(RunError, match="Stopped by SIGTERM"):
        train(tmp_path / "run", settings, Signalling(6))
    train(tmp_path / "run", settings, resume=True)
    whole, run = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("whole", "run"))
    assert whole.training["method"]["updates"].item() == 8
    states = ((whole.student, run.student), (whole.teacher, run.teacher))
    for one, other in (*states, (whole.training["method"], run.training["method"])):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    for log in ("metrics.jsonl", "steps.jsonl"):
        assert (tmp_path / "whole" / log).read_bytes() == (tmp_path / "run" / log).read_bytes()
    best = load_checkpoint(tmp_path / "whole/checkpoints/best.pt")
    assert best.training is None
    erm = memory_settings(method={"name": "erm"})
    assert (best.teacher or best.student).keys() == assemble(
        erm, MemoryDataset(), device="cpu"
    ).step.model.state_dict().keys()
    moved = whole.training["method"]
    assert not torch.equal(moved["project.left.0.weight"], moved["target.left.0.weight"])


@pytest.mark.parametrize(
    ("method", "refused"),
    [("simmmdg", True), ("moosa", True), ("cmrf", True), ("gmp", True), ("jat", True), ("nel", False), ("erm", False)],
)
def test_a_batch_too_small_for_own_batch_norms_is_refused_before_the_first_step(method, refused):
    told = {} if method == "erm" else {"hidden": 8}
    batches = {"epochs": 1, "batch_size": 1}
    settings = memory_settings(method={"name": method, **told}, training=batches, average={"kind": "ema"})
    if refused:
        with pytest.raises(SettingsError, match=f"method {method} has batch norms of its own, which need 2 clips"):
            assemble(settings, MemoryDataset(), device=torch.device("cpu"))
        batches["batch_norm"] = "frozen"
        settings = memory_settings(method={"name": method, **told}, training=batches, average={"kind": "ema"})
    assemble(settings, MemoryDataset(), device=torch.device("cpu"))


def test_a_batch_too_small_for_the_encoders_batch_norms_is_refused_by_a_dry_run_too():
    settings = memory_settings(method={"name": "erm"}, training={"batch_size": 1})
    with pytest.raises(SettingsError, match="batch norm has no statistics in a batch of one clip"):
        dry_run(settings, MemoryDataset())


def test_one_source_leaves_no_batch_norm_to_fill():
    training = {"epochs": 1, "batch_size": 1, "source_domains": ("a",)}
    for method in ("gmp", "jat"):
        settings = memory_settings(method={"name": method, "hidden": 8}, training=training, average={"kind": "ema"})
        assert assemble(settings, MemoryDataset(), device=torch.device("cpu")).step.method.least_batch == 1


def test_two_views_need_two_stored_ones(settings):
    cache = settings.cache.model_copy(update={"views": 1})
    with pytest.raises(SettingsError, match="reads 2 views of a clip per batch, and the cache has 1"):
        assemble(settings.model_copy(update={"cache": cache}), MemoryDataset(), device=torch.device("cpu"))
