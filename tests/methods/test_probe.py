"""The frozen probe against its plainly written step; what it reads, and that nothing of it moves."""

from __future__ import annotations

import pytest
import torch
from fakes import MemoryDataset, memory_settings
from plain import compare
from reference_probe import ProbeReference
from torch import nn

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.encoders import cut_encoder
from mbcd_cli.encoders.staged import Tail
from mbcd_cli.landscape.directions import moving_names
from mbcd_cli.model import MultiModalModel, build_model
from mbcd_cli.resolved import method_label, resolve, validate
from mbcd_cli.say import Say
from mbcd_cli.settings import ModelSettings
from mbcd_cli.settings.sources import to_toml
from mbcd_cli.training.assemble import assemble
from mbcd_cli.training.subject import Subject

PROBE = ModelSettings(tails="frozen", unimodal_head="linear", fused_head="linear")


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    step, plain = compare(
        ProbeReference, "probe", modalities=modalities, sources=sources, average={"kind": "ema", "beta": 0.9}
    )
    for name, value in plain.still.items():
        assert torch.equal(step.model.get_parameter(name.removeprefix("student.")), value)


def test_without_a_norm():
    compare(ProbeReference, "probe", modalities=3, norm="none")


@pytest.mark.parametrize("trunks", [False, True])
def test_the_encoder_moves_nowhere_its_batch_norms_neither(trunks):
    subject = Subject.of("probe")
    step = subject.training(cut="layer2", trunks=trunks, double=False).step
    encoders = {n: v.clone() for n, v in step.model.state_dict().items() if n.startswith(("tails.", "trunks."))}
    batch = subject.batch(0)
    if not trunks:
        wide = {name: (part.float().repeat(1, 3)[:, :16],) for name, (part,) in batch.inputs.items()}
        batch = type(batch)(wide, batch.labels, batch.domains, batch.clips)
    first = step.model.eval().features(step.model.at_cut(batch.inputs))
    for _ in range(3):
        step(batch)
    assert any("running_mean" in name for name in encoders)
    assert all(torch.equal(step.model.state_dict()[name], value) for name, value in encoders.items())
    assert step.model.training
    with torch.no_grad():  # as it was left by the step, in train mode
        again = step.model.features(step.model.at_cut(batch.inputs))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert moving_names(step.model, group="all") == ("fused_head.weight", "fused_head.bias")


def test_arrays_are_read_as_they_are():
    vector, steps = ArrayModality(dimension=5), ArrayModality(dimension=5, length=9)
    model = build_model(
        {"v": vector, "s": steps, "c": steps.model_copy(update={"encoder": "array-conv"})}, settings=PROBE, classes=3
    )
    assert model.dims == {"v": 5, "s": 45, "c": 5}
    assert [name for name, _ in model.named_parameters() if not name.startswith(("heads.", "fused_head."))] == []
    x, y = torch.randn(4, 5), torch.randn(4, 9, 5)
    pooled = model.pooled({"v": (x,), "s": (y,), "c": (y,)})
    assert torch.equal(pooled["v"], x)
    assert torch.equal(pooled["s"], y.flatten(1))
    torch.testing.assert_close(pooled["c"], y.mean(dim=1))
    assert isinstance(model.fused_head, nn.Linear)
    # Cut elsewhere, the cache holds what layers made of them: then it is the whole encoder that is frozen.
    _, tail = cut_encoder("v", vector.model_copy(update={"cut": "layer2"}), frozen=True)
    assert (tail.names, tail.frozen, tail.dim) == (("layer2", "pool"), ("layer2", "pool"), 128)


def test_it_is_said_that_nothing_has_trained_an_encoder():
    def said(dataset, **changes):
        lines = []
        settings = memory_settings(model={"tails": "frozen"}, method={"name": "erm"})
        modalities = {n: m.model_copy(update=changes) for n, m in settings.modalities.items()}
        settings = settings.model_copy(update={"modalities": modalities})
        assemble(settings, dataset, device=torch.device("cpu"), say=Say(lines.append))
        return lines

    dataset = MemoryDataset()
    assert said(dataset) == []
    (line,) = said(dataset, cut="layer1")
    assert line.startswith("warning: left, right: encoders that nothing has trained")
    dataset.pretrained = frozenset({"left", "right"})
    assert said(dataset, cut="layer1") == []


def test_a_probe_is_settings_that_another_method_does_not_inherit(tmp_path):
    probe = resolve(preset="hac", method="probe")
    assert (probe.model.tails, probe.model.unimodal_head, probe.model.fused_head) == ("frozen", "linear", "linear")
    assert (method_label(probe), probe.average.kind) == ("probe", "none")
    saved = tmp_path / "probe.toml"
    saved.write_text(to_toml(probe))
    assert resolve(config=saved) == probe
    assert resolve(config=saved, method="erm").model.tails == "trained"
    assert method_label(resolve(preset="hac", method="probe", sets=["model.fused_head=mlp"])) == "probe-custom"
    frozen = resolve(preset="hac", method="mbcd", sets=["model.tails=frozen"])
    assert (frozen.model.tails, method_label(frozen)) == ("frozen", "mbcd-custom")
    assert validate({"method": {"name": "erm"}}).model.tails == "trained"


def test_weights_of_a_probe_fit_a_model_of_its_settings():
    tails = {"a": Tail({"pool": nn.Identity()}, dim=4, frozen=("pool",))}
    model = MultiModalModel(tails, settings=PROBE, classes=3)
    assert set(model.state_dict()) == {"heads.a.weight", "heads.a.bias", "fused_head.weight", "fused_head.bias"}
