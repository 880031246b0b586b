"""JAT against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import compare, make, pinned_logits, small_batch
from reference_jat import JATReference
from small import named

from mbcd_cli.methods.parts import keep_at_least_one, mean_entropies, reversed_gradient

SMALL = {"hidden": 6, "fused_hidden": 7}


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("method", ["jat", "jat-benchmark"])
def test_step(modalities, sources, method):
    step, plain = compare(JATReference, method, SMALL, modalities=modalities, sources=sources, average={"kind": "sma"})
    assert (plain.removed > 0) == (method == "jat")
    assert (step.method.domain_adversary is None) == (sources == 1)
    uneven = modalities > 1 and (sources == 2 or method == "jat-benchmark")
    assert (plain.weights.max() > plain.weights.min()) == uneven


def test_other_settings_and_another_chassis():
    told = {**SMALL, "temperature": 0.2, "modality_reversal": 0.7, "domain_reversal": 0.9, "dropout": 0.9}
    told |= {"modality_weight": 0.4, "domain_weight": 1.5, "unimodal_weight": 0.3, "weights_sum": "one"}
    compare(JATReference, "jat", told, modalities=3, norm="none", unimodal_head="linear")
    compare(JATReference, "jat", {**SMALL, "weighting": "off", "unimodal": "probe"}, modalities=3)


def test_recipes():
    for method, average, sum_of_weights in (("jat", "ema", 3.0), ("jat-benchmark", "none", 3.0)):
        training, settings = make(method, SMALL, modalities=3)
        assert settings.average.kind == average
        assert (training.step.average is None) == (average == "none")
        figures = named(training.step, training.step(small_batch(0, 3)))
        assert float(figures["w"].sum()) == pytest.approx(sum_of_weights)


def test_every_adversary_is_trained_and_saved_but_not_deployed():
    training, _ = make("jat", SMALL)
    step = training.step
    optimized = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    names = {name.split(".")[0] for name, p in step.method.named_parameters() if id(p) in optimized}
    assert names == {"modality_adversary", "domain_adversary", "fused_adversary"}
    assert all(id(p) in optimized for p in step.method.parameters())
    assert {name.split(".")[0] for name in step.method.state_dict()} == names
    assert not any("adversary" in name for name in step.model.state_dict())


def test_pinned_numbers():
    entropies = torch.stack(mean_entropies([pinned_logits(5 + k, classes=2) for k in range(3)]))
    expected = torch.tensor([0.322755473575, 0.337443892510, 0.339800633915], dtype=torch.float64)
    torch.testing.assert_close(entropies.softmax(dim=0), expected, rtol=0, atol=1e-12)


def test_a_clip_keeps_a_modality_and_any_of_them_alike():
    uniform = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0))
    keep = keep_at_least_one(uniform, 0.9)
    assert keep.sum(dim=1).min() == 1
    expected = 0.1 + 0.9**3 / 3
    assert keep.mean(dim=0).tolist() == pytest.approx([expected] * 3, abs=0.02)
    assert torch.equal(keep_at_least_one(uniform, 0.0), torch.ones(20000, 3))


def test_the_reversal_turns_the_gradient_only():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = reversed_gradient(x, 0.3)
    assert torch.equal(y, x)
    (3 * y).sum().backward()
    assert x.grad.tolist() == pytest.approx([-0.9, -0.9])
