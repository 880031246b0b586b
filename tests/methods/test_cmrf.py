"""CMRF against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import CLOSE, compare, make, pinned_rows
from reference_cmrf import CMRFReference

from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.cmrf import interpolation_distance
from mbcd_cli.methods.mixup import beta_quantiles
from mbcd_cli.methods.parts import unit_rows
from mbcd_cli.resolved import resolve


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    """Two steps before the teacher averages, three after it has begun."""
    step, plain = compare(
        CMRFReference,
        "cmrf",
        {"hidden": 7},
        modalities=modalities,
        sources=sources,
        average={"start": 2},
        unimodal_head="linear",
    )
    expected = {n: v for held in (plain.teacher, plain.teacher_buffers) for n, v in held.items()}
    for name, value in step.method.teacher_projections.state_dict().items():
        torch.testing.assert_close(value, expected[f"method.projections.{name}"], **CLOSE, msg=f"average of {name}")


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_the_public_benchmark_s_sum_with_projections_that_no_optimizer_holds(modalities):
    told = {"hidden": 7, "simmmdg": 0.5}
    step, plain = compare(CMRFReference, "cmrf-benchmark", told, modalities=modalities, average={"start": 2})
    drawn = {name: v for name, v in step.method.projections.named_parameters() if not v.requires_grad}
    assert {name.split(".")[0] for name in drawn} == {"video", "flow"} & set(step.model.modalities)
    for name, value in drawn.items():
        assert torch.equal(value, plain.frozen[f"method.projections.{name}"])


def test_an_exponential_teacher_from_the_first_step_on():
    told = {"hidden": 7, "unimodal": "probe", "beta": 1.0, "distillation": 0.5}
    compare(CMRFReference, "cmrf", told, average={"kind": "ema", "beta": 0.8, "start": 0}, norm="none")


def test_pinned_numbers():
    kept = torch.tensor([0.9, 0.6, 0.97, 0.51, 0.8, 0.99], dtype=torch.float64)
    student = unit_rows(pinned_rows(0) * torch.linspace(0.5, 1.5, 4, dtype=torch.float64))
    found = interpolation_distance(student, pinned_rows(0), pinned_rows(1), kept)
    torch.testing.assert_close(found, torch.tensor(0.410240800367, dtype=torch.float64), rtol=0, atol=1e-12)


def test_distribution_of_the_interpolation():
    kept = beta_quantiles(0.1, above=0.5)
    found = [kept.mean().item(), (kept > 0.9).double().mean().item(), (kept > 0.99).double().mean().item()]
    assert found == pytest.approx([0.9416, 0.813, 0.641], abs=6e-4)
    assert 0.5 < kept.min() <= kept.max() <= 1


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("cmrf", {"modality_weights": {"vidoe": 0.25}}),
        ("cmrf-benchmark", {"random_projections": ("vidoe",)}),
        ("rna-net", {"priority": ("vidoe",)}),
    ],
)
def test_a_modality_that_there_is_not_is_refused(method, told):
    with pytest.raises(SettingsError, match=rf"method\.{next(iter(told))} names vidoe.*\n.*Did you mean video\?"):
        make(method, told)


def test_it_needs_a_teacher():
    with pytest.raises(SettingsError, match="average"):
        resolve(method="cmrf", sets=["average.kind=none"])
    settings = resolve(method="cmrf", sets=["method.modality_weights.flow=0.25"])
    assert (settings.average.kind, settings.average.start) == ("sma", 100)
    assert settings.method.modality_weights["flow"] == 0.25
