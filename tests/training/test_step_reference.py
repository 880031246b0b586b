"""The step of MBCD against the plainly written one: losses, s, r, p, gradients, weights, buffers, teacher."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import KINDS, ReferenceStep
from small import Recorder, make_step, named, small_batch, small_model

from mbcd_cli.methods.base import Method
from mbcd_cli.methods.mbcd import MBCD
from mbcd_cli.processes import Group

CLOSE = {"rtol": 0, "atol": 1e-10}


def switches(dropout="adaptive", order="first", distil=True, noise=True, **more) -> dict:
    return {
        "dropout": {"strategy": dropout, "rate": 0.4, "score": more.pop("score", "confidence")},
        "consistency": {"order": order, "alpha": 0.3},  # large, so that a wrong inner step shows
        "distillation": {"enabled": distil, "weight": 0.7},
        "feature_noise": {"enabled": noise},
        **more,
    }


# (average, distillation): none, an average only, and one that is distilled from.
TEACHERS = {"none": (None, False), "ema": (0.8, False), "distil": (0.8, True)}


def compare(
    settings,
    *,
    average=0.8,
    modalities=2,
    steps=2,
    batch_norm="tracked",
    head_dropout=0.0,
    size=7,
    live=False,
    kind=MBCD,
    told=None,
):
    """`settings` are MBCD's, as the reference takes them; `told` what another `kind` of method is told instead."""
    kinds = KINDS[:modalities]
    model = small_model(modalities, kinds, dropout=head_dropout, live=live)
    reference = ReferenceStep(
        model,
        MBCD.Settings.model_validate(settings),
        lr=1e-2,
        weight_decay=1e-2,
        batch_norm=batch_norm,
        head_dropout=head_dropout,
    )
    recorder = Recorder()
    step = make_step(
        model,
        kind,
        settings if told is None else told,
        average=average,
        weight_decay=1e-2,
        randomness=recorder,
        batch_norm=batch_norm,
    )
    teacher = step.average
    for index in range(steps):
        batch = small_batch(modalities, kinds, size=size, seed=index)
        torch.manual_seed(index)
        figures = named(step, step(batch))
        torch.manual_seed(index)
        expected = reference.step(batch.inputs, batch.labels, [d.double() for d in recorder.draws])
        recorder.draws.clear()
        assert kind is not MBCD or set(figures) == set(expected)
        for name, have in figures.items():
            value = expected[name].detach().double()
            torch.testing.assert_close(have.double(), value, **CLOSE, msg=f"{name}, step {index}")
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
    for dropout, teacher in itertools.product(("none", "fixed", "adaptive"), TEACHERS):
        average, distil = TEACHERS[teacher]
        compare(switches(dropout, order, distil, noise), average=average)


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["off", "first", "second"])
def test_any_number_of_modalities_over_twenty_steps(modalities, order):
    compare(switches(order=order), modalities=modalities, steps=20)


@pytest.mark.parametrize("order", ["off", "first", "second"])
def test_frozen_batch_norm(order):
    compare(switches(order=order), modalities=3, batch_norm="frozen", steps=3)


@pytest.mark.parametrize("order", ["off", "first", "second"])
@pytest.mark.parametrize("noise", [True, False])
def test_live_trunks(order, noise):
    """The reference runs its trunks whole in every pass: twice in train mode, and in eval mode in the teacher."""
    for average, distil in TEACHERS.values():
        compare(switches(order=order, distil=distil, noise=noise), average=average, modalities=3, steps=4, live=True)


def test_live_trunks_under_a_frozen_batch_norm():
    compare(switches(), modalities=3, batch_norm="frozen", steps=3, live=True)


@pytest.mark.parametrize("batch_norm", ["tracked", "frozen"])
def test_running_statistics_of_live_trunks_are_averaged_over_the_processes(batch_norm):
    averaged = []

    class Watched(Group):
        def average_(self, tensors):
            averaged.extend(tensor.data_ptr() for tensor in tensors)

    model = small_model(2, KINDS[:2], live=True)
    step = make_step(model, settings=switches(), randomness=Recorder(), batch_norm=batch_norm, group=Watched())
    step(small_batch(2, KINDS[:2]))
    for name, buffer in model.named_buffers():
        moves = name.startswith("trunks.") or batch_norm == "tracked"
        assert (buffer.data_ptr() in averaged) == (moves and buffer.is_floating_point()), name


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_probing_heads(noise, teacher):
    average, distil = TEACHERS[teacher]
    compare(switches("adaptive", "off", distil, noise, unimodal="probe"), average=average, modalities=3, steps=3)


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("unimodal", ["joint", "probe"])
def test_erm(modalities, unimodal):
    """The base class is MBCD without any of its parts."""
    off = switches("none", "off", False, False, unimodal=unimodal)
    for average in (None, 0.8):
        compare(off, average=average, modalities=modalities, steps=4, kind=Method, told={"unimodal": unimodal})


def test_true_class_score():
    compare(switches(score="true_class"), modalities=3, steps=3)


@pytest.mark.parametrize("order", ["off", "first", "second"])
def test_dropout_inside_the_heads(order):
    compare(switches(order=order), modalities=3, steps=3, head_dropout=0.5)


def test_noise_leaves_a_batch_of_one_alone():
    compare(switches(), modalities=1, size=1, steps=2)
