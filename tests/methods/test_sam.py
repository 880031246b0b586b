"""SAM against its plainly written step."""

from __future__ import annotations

import pytest
import torch
from plain import compare, make, small_batch
from reference_sam import SAMReference


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    compare(SAMReference, "sam", modalities=modalities, sources=sources, average={"kind": "sma"})


def test_heads_that_train_are_moved_too():
    compare(SAMReference, "sam", {"rho": 0.5, "unimodal": "joint"}, modalities=3, norm="none", unimodal_head="linear")


def test_the_perturbation_is_taken_back_bit_for_bit_and_probes_do_not_move_what_is_deployed():
    """With a learning rate of 0, and with uni-modal heads of other weights."""
    step = make("sam", {"rho": 3.0})[0].step
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    before = {n: v.clone() for n, v in step.model.state_dict().items()}
    figures = step(small_batch(0))
    assert torch.isfinite(figures).all()
    assert all(torch.equal(v, before[n]) for n, v in step.model.state_dict().items())

    gradients = []
    for factor in (1.0, 5.0):
        step = make("sam", {"rho": 0.5})[0].step
        with torch.no_grad():
            for p in step.model.heads.parameters():
                p.mul_(factor)
        step(small_batch(0))
        deployed = [p for n, p in step.model.named_parameters() if not n.startswith("heads.")]
        gradients.append([p.grad for p in deployed])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
