"""Gradient-Blending against its plainly written step, branches trained one by one, and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from memory import MemoryEpoch
from plain import LABELS, compare, make, pinned_logits, small_batch
from reference_blending import BlendingReference, weights_of

from mbcd_cli.methods.blending import BranchLosses, blend
from mbcd_cli.methods.parts import cross_entropy


def clips_of(step, settings, modalities):
    return MemoryEpoch(
        lambda ahead: [small_batch(20 + 2 * ahead + number, modalities) for number in range(2)],
        [small_batch(40, modalities, size=9), small_batch(41, modalities, size=4)],
        step=step,
        built=settings.optimizer,
    )


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    def begin(step):
        weights = torch.arange(2.0, modalities + 2)
        step.method.of_modality.copy_(weights / weights.sum() / 2)
        step.method.of_fused.fill_(0.5)

    more = {"modalities": modalities, "sources": sources, "average": {"kind": "sma"}}
    compare(BlendingReference, "g-blending", begin=begin, **more)


@pytest.mark.parametrize("modalities", [1, 3])
def test_weights_are_those_of_branches_that_train_alone(modalities):
    training, settings = make("g-blending", {"epochs": 3}, modalities=modalities, norm="none")
    step = training.step
    plain, clips = BlendingReference(training, settings), clips_of(step, settings, modalities)
    drawn, kept = torch.get_rng_state(), {n: v.clone() for n, v in step.model.state_dict().items()}
    step.method.before_epoch(clips)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, kept[name]) for name, value in step.model.state_dict().items())
    expected = weights_of(plain, lambda epoch: list(clips.training(epoch)), list(clips.validation()), 3)
    found = [float(step.method.of_fused), *step.method.of_modality.tolist()]
    assert found == pytest.approx(expected, rel=0, abs=1e-10)
    step.context.epoch.fill_(1)
    step.method.of_fused.fill_(0.25)
    step.method.before_epoch(clips)
    assert float(step.method.of_fused) == 0.25


def test_branches_that_do_not_move_weigh_alike():
    nothing = BranchLosses([1.0, 2.0], [1.5, 2.5])
    assert blend(nothing, nothing) == [0.5, 0.5]


def test_pinned_numbers():
    def losses(factor):
        return [float(cross_entropy(factor * pinned_logits(k), LABELS)) for k in (0, 1, 3)]

    found = blend(BranchLosses(losses(1.0), losses(0.8)), BranchLosses(losses(1.6), losses(1.0)))
    assert found == pytest.approx([0.368956032829, 0.318917699434, 0.312126267738], abs=1e-11)
