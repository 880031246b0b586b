"""The engine's step against the plainly written one: losses, s, r, p, gradients, weights, buffers, teacher."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import KINDS, ReferenceStep
from small import Recorder, small_batch, small_model

from mbcd_cli.engine.optimizer import build_optimizer
from mbcd_cli.engine.step import TrainStep
from mbcd_cli.engine.teacher import Teacher
from mbcd_cli.processes import Group
from mbcd_cli.settings import ObjectiveSettings, OptimizerSettings

CLOSE = {"rtol": 0, "atol": 1e-10}


def objective(dropout="adaptive", order="first", teacher="distil", noise=True, **more) -> ObjectiveSettings:
    return ObjectiveSettings.model_validate(
        {
            "dropout": {"strategy": dropout, "rate": 0.4, "score": more.pop("score", "confidence")},
            "consistency": {"order": order, "alpha": 0.3},  # large, so that a wrong inner step shows
            "teacher": {"enabled": teacher != "none", "beta": 0.8},
            "distillation": {"enabled": teacher == "distil", "weight": 0.7},
            "feature_noise": {"enabled": noise},
            **more,
        }
    )


def compare(settings, *, modalities=2, steps=2, batch_norm="tracked", head_dropout=0.0, size=7, live=False):
    kinds = KINDS[:modalities]
    model = small_model(modalities, kinds, dropout=head_dropout, live=live)
    optimizer = OptimizerSettings(lr=1e-2, weight_decay=1e-2)
    reference = ReferenceStep(
        model, settings, lr=1e-2, weight_decay=1e-2, batch_norm=batch_norm, head_dropout=head_dropout
    )
    teacher = Teacher(model, beta=settings.teacher.beta) if settings.teacher.enabled else None
    recorder = Recorder()
    step = TrainStep(
        model=model,
        settings=settings,
        optimizer=build_optimizer(model.parameters(), optimizer),
        teacher=teacher,
        randomness=recorder,
        batch_norm=batch_norm,
    )
    for index in range(steps):
        batch = small_batch(modalities, kinds, size=size, seed=index)
        torch.manual_seed(index)
        result = step(batch)
        torch.manual_seed(index)
        expected = reference.step(batch.inputs, batch.labels, [d.double() for d in recorder.draws])
        recorder.draws.clear()
        for name, value in expected.items():
            have = getattr(result, name) if hasattr(result, name) else getattr(result.terms, name)
            torch.testing.assert_close(have.double(), value.detach().double(), **CLOSE, msg=f"{name}, step {index}")
        for name, parameter in model.named_parameters():
            if name in reference.frozen:
                assert parameter.grad is None
                assert torch.equal(parameter, reference.values[name])
                continue
            torch.testing.assert_close(parameter.grad, reference.grads[name], **CLOSE, msg=f"gradient of {name}")
            torch.testing.assert_close(parameter.data, reference.values[name].data, **CLOSE, msg=name)
        # A live trunk runs once where the reference runs it twice: its counters differ, and mean nothing.
        counters = {n for n, b in model.named_buffers() if n.startswith("trunks.") and not b.is_floating_point()}
        for name, buffer in model.named_buffers():
            if name not in counters:
                torch.testing.assert_close(buffer, reference.buffers[name], **CLOSE, msg=name)
        if teacher is not None:
            for name, value in teacher.model_for_evaluation().state_dict().items():
                if name not in counters:
                    torch.testing.assert_close(value, reference.teacher[name], **CLOSE, msg=f"teacher's {name}")


@pytest.mark.parametrize("order", ["off", "first", "second"])
@pytest.mark.parametrize("noise", [True, False])
def test_every_switch_with_two_modalities(order, noise):
    for dropout, teacher in itertools.product(("none", "fixed", "adaptive"), ("none", "ema", "distil")):
        compare(objective(dropout, order, teacher, noise))


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["off", "first", "second"])
def test_any_number_of_modalities_over_twenty_steps(modalities, order):
    compare(objective(order=order), modalities=modalities, steps=20)


@pytest.mark.parametrize("order", ["off", "first", "second"])
def test_frozen_batch_norm(order):
    compare(objective(order=order), modalities=3, batch_norm="frozen", steps=3)


@pytest.mark.parametrize("order", ["off", "first", "second"])
@pytest.mark.parametrize("noise", [True, False])
def test_live_trunks(order, noise):
    """The reference runs its trunks whole in every pass: twice in train mode, and in eval mode in the teacher."""
    for teacher in ("none", "ema", "distil"):
        compare(objective(order=order, teacher=teacher, noise=noise), modalities=3, steps=4, live=True)


def test_live_trunks_under_a_frozen_batch_norm():
    compare(objective(), modalities=3, batch_norm="frozen", steps=3, live=True)


@pytest.mark.parametrize("batch_norm", ["tracked", "frozen"])
def test_running_statistics_of_live_trunks_are_averaged_over_the_processes(batch_norm):
    averaged = []

    class Watched(Group):
        def average_(self, tensors):
            averaged.extend(tensor.data_ptr() for tensor in tensors)

    model = small_model(2, KINDS[:2], live=True)
    settings = objective()
    step = TrainStep(
        model=model,
        settings=settings,
        optimizer=build_optimizer(model.parameters(), OptimizerSettings()),
        teacher=Teacher(model, beta=0.9),
        randomness=Recorder(),
        batch_norm=batch_norm,
        group=Watched(),
    )
    step(small_batch(2, KINDS[:2]))
    for name, buffer in model.named_buffers():
        moves = name.startswith("trunks.") or batch_norm == "tracked"
        assert (buffer.data_ptr() in averaged) == (moves and buffer.is_floating_point()), name


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("teacher", ["none", "ema", "distil"])
def test_probing_heads(noise, teacher):
    compare(objective("adaptive", "off", teacher, noise, unimodal="probe"), modalities=3, steps=3)


def test_true_class_score():
    compare(objective(score="true_class"), modalities=3, steps=3)


@pytest.mark.parametrize("order", ["off", "first", "second"])
def test_dropout_inside_the_heads(order):
    compare(objective(order=order), modalities=3, steps=3, head_dropout=0.5)


def test_noise_leaves_a_batch_of_one_alone():
    compare(objective(), modalities=1, size=1, steps=2)
