"""GMP against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import LABELS, compare, pinned_logits
from reference_gmp import GMPReference

from mbcd_cli.methods.gmp import confusion, dominance
from mbcd_cli.methods.modality_dropout import scores
from mbcd_cli.methods.parts import modulation


@pytest.mark.parametrize("method", ["gmp", "gmp-benchmark"])
@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(method, modalities, sources):
    _, plain = compare(
        GMPReference, method, {"hidden": 6}, modalities=modalities, sources=sources, average={"kind": "sma"}
    )
    assert sources == 1 or plain.conflicts


def test_heads_that_train_on_the_fused_losses_and_a_strong_adversary():
    told = {"hidden": 6, "unimodal": "joint", "unimodal_weight": 2.0, "domain_weight": 4.0, "alpha_domain": 0.1}
    _, plain = compare(GMPReference, "gmp", told, modalities=3, unimodal_head="linear", fused_head="linear")
    assert plain.conflicts


def test_the_public_norm_and_another_chassis():
    told = {"hidden": 6, "norm_with_head": True, "domain_weight": 4.0, "reversal": 0.9, "alpha_domain": 0.1}
    _, plain = compare(GMPReference, "gmp-benchmark", told, modalities=3, norm="none", unimodal_head="linear")
    assert plain.conflicts


@pytest.mark.parametrize(("method", "frozen"), [("gmp", 3 * 2 + 6 + 4), ("gmp-benchmark", 3 * 2 + 6)])
def test_an_adversary_that_never_trains(method, frozen):
    step, plain = compare(
        GMPReference, method, {"hidden": 6, "adversary": "frozen", "domain_weight": 4.0}, modalities=3
    )
    assert plain.conflicts
    assert len(plain.frozen) == frozen
    for name, value in step.method.named_parameters():
        assert torch.equal(value, plain.frozen[f"method.{name}"])


def test_pinned_numbers():
    domains = torch.tensor([0, 0, 1, 1, 0, 1])
    rho = dominance(scores([pinned_logits(k) for k in range(3)], LABELS, score="true_class") / 6)
    sigma = confusion(scores([pinned_logits(5 + k, classes=2) for k in range(3)], domains, score="true_class") / 6)
    found = torch.stack([rho, sigma, modulation(rho, 0.5), modulation(sigma, 0.5)])
    expected = [
        [1.025485471641, 0.957268206745, 1.018178831502],
        [1.277194511462, 0.955913355543, 0.832508734122],
        [0.527920550574, 1, 0.530764587699],
        [0.436056316401, 1, 1],
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)
