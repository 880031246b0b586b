"""CORAL, MMD and DANN against their plainly written steps, and by hand."""

from __future__ import annotations

import pytest
import torch
from plain import CLOSE, compare, make, pinned_features
from reference_alignment import CORALReference, DANNReference, MMDReference, coral, mmd
from torch.nn import functional as F

from mbcd_cli.errors import SettingsError
from mbcd_cli.methods.coral import moments_apart
from mbcd_cli.methods.mmd import embeddings_apart

GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
REFERENCES = {"coral": CORALReference, "mmd": MMDReference, "dann": DANNReference}
TOLD = {"coral": {"weight": 0.7}, "mmd": {"weight": 0.7}, "dann": {"hidden": 6, "ramp": 3, "reversal": 0.6}}


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("method", REFERENCES)
def test_step(method, modalities):
    compare(REFERENCES[method], method, TOLD[method], modalities=modalities, average={"kind": "sma"})


@pytest.mark.parametrize("on", ["fused", "unimodal"])
@pytest.mark.parametrize("method", REFERENCES)
def test_fused_or_unimodal_features_alone_on_another_chassis(method, on):
    told = {**({"gammas": [0.5, 2.0]} if method == "mmd" else {}), "on": on, "unimodal": "joint"}
    compare(REFERENCES[method], method, told, modalities=3, norm="none", unimodal_head="linear")


@pytest.mark.parametrize("method", [*REFERENCES, "mixup-domains"])
def test_one_source_domain_is_refused(method):
    with pytest.raises(SettingsError, match=f"{method} compares source domains, and there is one"):
        make(method, sources=1)


# Of two domains: both, one clip of the second, none of it.
@pytest.mark.parametrize("domains", [[0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0], [0] * 6])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_distances_and_their_gradients(k, domains):
    """A domain with one clip has no covariance; one without clips has no distance at all."""
    labels = [(4, 2)[d] for d in domains]
    member = F.one_hot(torch.tensor(domains), 2)
    for ours, plain in (
        (lambda h: moments_apart(h, member), lambda h: coral(h, labels)),
        (lambda h: embeddings_apart(h, member, GAMMAS), lambda h: mmd(h, labels, GAMMAS)),
    ):
        mine, theirs = (pinned_features(k).requires_grad_() for _ in range(2))
        value, expected = ours(mine), plain(theirs)
        torch.testing.assert_close(value, expected, **CLOSE)
        value.backward()
        expected.backward()
        torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
        if len(set(domains)) == 1:
            assert value == 0
            assert not mine.grad.any()


def test_three_domains_of_which_one_is_missing():
    """The mean is over the pairs that are there."""
    domains = torch.tensor([0, 0, 2, 2, 0, 2])
    two, three = F.one_hot(domains // 2, 2), F.one_hot(domains, 3)
    h = pinned_features(0)
    torch.testing.assert_close(moments_apart(h, three), moments_apart(h, two), **CLOSE)
    torch.testing.assert_close(embeddings_apart(h, three, GAMMAS), embeddings_apart(h, two, GAMMAS), **CLOSE)


def test_by_hand():
    """Domains {(0, 0), (2, 0)} and {(0, 0), (0, 4)}: means (1, 0), (0, 2), covariances diag(2, 0), diag(0, 8)."""
    h = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    member = F.one_hot(torch.tensor([0, 0, 1, 1]), 2)
    assert moments_apart(h, member).item() == pytest.approx((1 + 4) / 2 + (4 + 64) / 4)
    k = torch.exp(-0.1 * torch.tensor([0.0, 4.0, 16.0, 20.0], dtype=torch.float64))
    own = (2 + 2 * k[1]) / 4 + (2 + 2 * k[2]) / 4
    cross = (k[0] + k[2] + k[1] + k[3]) / 4
    assert embeddings_apart(h, member, (0.1,)).item() == pytest.approx((own - 2 * cross).item())
