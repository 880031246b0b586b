"""MBCD that forces no broken branch: its variants against the plainly written step, and what they are for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory import MemoryEpoch
from plain import make
from reference_reliable import ReliableReference, ratios

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from small import CLASSES, KINDS_ALL, Recorder, make_step, named, small_batch, small_model

from mbcd_cli.methods import METHODS, method_class
from mbcd_cli.methods.mbcd import MBCD
from mbcd_cli.methods.modality_dropout import only_where_others_agree
from mbcd_cli.methods.reliability import Reliability, ReliabilitySettings, logits_by_regression, of_the_others
from mbcd_cli.training.subject import Subject, weights

CLOSE = {"rtol": 0, "atol": 1e-10}
FITTED = 1e-6
"""How far two optimizers may end from each other in the loss of a regression that both fit."""
OWN = {"distillation": {"weight": 0.7}, "consistency": {"order": "first", "alpha": 0.3}}
VARIANTS = {
    "left_out": {"reliability": {"by": "left_out", "power": 0.8}},
    "validation": {"reliability": {"by": "validation", "power": 1.5}},
    "arl": {"reliability": {"by": "arl"}},
    "agreement": {"dropout": {"agreement": True}},
    "conflict": {"conflict": {"weight": 0.6}},
    "all": {"reliability": {"by": "left_out"}, "dropout": {"agreement": True}, "conflict": {"weight": 0.6}},
}


def batch_of(modalities, sources, *, seed, size=7):
    batch = small_batch(modalities, KINDS_ALL, size=size, seed=seed)
    return replace(batch, domains=torch.tensor([4, 2][:sources])[torch.arange(size) * (seed + 1) % sources])


def compare(told, *, modalities=2, sources=2, steps=4, order="first"):
    told = {**OWN, "consistency": {"order": order, "alpha": 0.3}, **told}
    settings, kinds = MBCD.Settings.model_validate(told), KINDS_ALL[:modalities]
    model, recorder = small_model(modalities, kinds), Recorder()
    reference = ReliableReference(model, settings, lr=1e-2, weight_decay=1e-2)
    step = make_step(model, MBCD, told, weight_decay=1e-2, randomness=recorder, sources=[4, 2][:sources])
    step.method.double()
    reference.begin(CLASSES, [4, 2][:sources])
    for index in range(steps):
        if index in (0, 2):
            clips = MemoryEpoch(held_out=[batch_of(modalities, sources, seed=70 + seed) for seed in range(3)])
            step.method.before_epoch(clips)
            step.train_mode(model)
            if settings.reliability.by in ("left_out", "validation"):
                reference.look([(b.inputs, b.labels, b.domains) for b in clips.held_out])
                nll = torch.tensor(reference.nll, dtype=torch.float64)
                torch.testing.assert_close(step.method.reliability.nll, nll, rtol=0, atol=FITTED)
                reference.nll = step.method.reliability.nll.tolist()
        batch = batch_of(modalities, sources, seed=index)
        figures = named(step, step(batch))
        reference.domains = batch.domains
        expected = reference.step(batch.inputs, batch.labels, [d.double() for d in recorder.draws])
        recorder.draws.clear()
        if "q" in figures:
            q = torch.tensor(reference.q, dtype=torch.float64)
            torch.testing.assert_close(figures.pop("q"), q, **CLOSE)
        assert set(figures) == set(expected)
        for name, have in figures.items():
            torch.testing.assert_close(have.double(), expected[name].detach().double(), **CLOSE, msg=name)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, reference.grads[name], **CLOSE, msg=f"gradient of {name}")
            torch.testing.assert_close(parameter.data, reference.values[name].data, **CLOSE, msg=name)
        for name, value in step.average.model_for_evaluation().state_dict().items():
            torch.testing.assert_close(value, reference.teacher[name], **CLOSE, msg=f"teacher's {name}")
    return reference, figures


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_step(variant, modalities, sources):
    compare(VARIANTS[variant], modalities=modalities, sources=sources)


@pytest.mark.parametrize("order", ["off", "second"])
def test_other_orders_of_consistency(order):
    compare(VARIANTS["all"], modalities=3, order=order)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_without_power_or_weight_it_is_mbcd_bit_for_bit(power):
    """A factor of 1 changes no bit; with power 1 the same training is another."""
    ends = []
    for told in ({}, {"reliability": {"by": "left_out", "power": power}}):
        training = Subject.of("mbcd", told).training()
        if told:
            training.step.method.reliability.nll.copy_(torch.tensor([0.1, 2.0]))
        for seed in range(4):
            training.step(Subject.of("mbcd").batch(seed))
        ends.append({n: v for n, v in weights(training.step).items() if not n.startswith("method.")})
    equal = all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert equal == (power == 0)


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("mbcd-")])
def test_variants_are_settings_of_one_class(name):
    assert method_class(name) is MBCD


def test_a_modality_of_high_loss_is_not_forced():
    """The second is worth a tenth: the first is dropped a tenth as often, the second hears the teacher as little."""
    settings = ReliabilitySettings(by="validation")
    training, _ = make("mbcd", modalities=2)
    reliability = Reliability(settings, training.step.context)
    reliability.nll.copy_(torch.tensor([0.1, 1.0]))
    q = reliability.q({}, None)
    torch.testing.assert_close(of_the_others(q), torch.tensor([0.1, 10.0]))
    assert ratios([4.0, 1.0, 2.0]) == of_the_others(torch.tensor([4.0, 1.0, 2.0])).tolist() == [0.5, 4.0, 2.0]


def test_loss_of_a_left_out_source_is_that_of_probes_that_have_not_seen_it():
    """Classes that lie alike in both sources, apart, and exchanged: no head that has seen both loses anything."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    centre = 3 * torch.eye(6, dtype=torch.float64)

    def rows(at):
        return centre[at] + 0.1 * torch.randn(30, 6, generator=g, dtype=torch.float64)

    found = []
    for elsewhere in (labels, labels + 3, (labels + 1) % 3):
        logits = logits_by_regression(rows(labels), labels, rows(elsewhere), classes=3)
        found.append(float(torch.nn.functional.cross_entropy(logits, labels)))
    of_alike, of_apart, of_exchanged = found
    assert of_alike < 0.1
    assert of_apart > 0.9
    assert of_exchanged > 3


def test_where_one_source_alone_has_held_out_clips_it_is_the_heads_own_loss():
    model, found = small_model(2, KINDS_ALL[:2]), []
    for by in ("left_out", "validation"):
        step = make_step(model, MBCD, {**OWN, "reliability": {"by": by}}, randomness=Recorder(), sources=[4, 2])
        step.method.before_epoch(MemoryEpoch(held_out=[batch_of(2, 1, seed=70)]))
        found.append(step.method.reliability.nll)
    assert torch.equal(*found)
    assert bool((found[0] != 1).all())


def test_a_class_that_the_other_sources_lack_has_a_finite_loss():
    rows = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 1]]
    logits = logits_by_regression(rows, torch.tensor([0, 1, 0, 1]), torch.eye(4, dtype=torch.float64), classes=5)
    assert logits.shape == (4, 5)
    assert bool(logits.isfinite().all())
    assert bool((logits[:, 2:] <= logits[:, :2].amax(dim=1, keepdim=True)).all())


def test_dropped_clips_are_those_that_the_rest_tells():
    logits = [torch.eye(3)[[0, 1, 2, 0]], torch.eye(3)[[0, 0, 2, 1]]]
    labels = torch.tensor([0, 1, 2, 2])
    first_dropped = torch.tensor([[0.0, 1.0]]).repeat(4, 1)
    kept = only_where_others_agree(first_dropped, logits, labels)
    assert kept.tolist() == [[0, 1], [1, 1], [0, 1], [1, 1]]
    none_left = torch.zeros(4, 2)
    assert only_where_others_agree(none_left, logits, labels).tolist() == [[1, 1]] * 4
