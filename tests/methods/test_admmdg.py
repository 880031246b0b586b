"""ADMMDG against its plainly written step and pinned numbers."""

from __future__ import annotations

import pytest
import torch
from plain import LABELS, compare, pinned_rows
from reference_admmdg import ADMMDGReference

from mbcd_cli.methods.admmdg import Pairs, gram_matrix, projected, weighted_contrast
from mbcd_cli.methods.parts import unit_rows

SMALL = {"hidden": 6}


def begin(step):
    """Pairs that weigh unlike: at 0 many gradients are of rounding alone, of which Adam makes steps."""
    for pairs in (step.method.pairs_across, step.method.pairs_within):
        if pairs.requires_grad:
            with torch.no_grad():
                pairs.copy_(torch.randn(pairs.shape, generator=torch.Generator().manual_seed(1), dtype=pairs.dtype))


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_step(modalities, sources):
    more = {"modalities": modalities, "sources": sources, "average": {"beta": 0.8}}
    _, plain = compare(ADMMDGReference, "admmdg", SMALL, steps=3, begin=begin, **more)
    assert plain.conflicts
    assert plain.removed or modalities == 1


def test_its_constants_on_another_chassis():
    told = {"across": 0.7, "within": 0.5, "separation": 0.02, "temperature": 0.3, "dropout": 0.0}
    noise = {"feature_noise": {"enabled": False}}
    compare(ADMMDGReference, "admmdg", SMALL | told | noise, modalities=4, norm="none", steps=3, begin=begin)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, *expected):
    torch.testing.assert_close(found, double(*expected), rtol=0, atol=1e-11)


DOMAINS = torch.tensor([0, 0, 1, 1, 0, 1])


def pair_logits():
    """A[g, h] = sin(1 + 2g + 3h) of groups 2k + d, and W[k, s, t] = cos(1 + 2k + 3s + 5t)."""
    g = torch.arange(6.0, dtype=torch.float64)
    k, s = torch.arange(3.0, dtype=torch.float64)[:, None, None], torch.arange(2.0, dtype=torch.float64)
    across = torch.sin(1 + 2 * g[:, None] + 3 * g[None]).reshape(3, 2, 3, 2)
    return across, torch.cos(1 + 2 * k + 3 * s[None, :, None] + 5 * s[None, None, :])


def contrasts(across, within, count=3, domains=DOMAINS):
    pairs = Pairs.of(LABELS, domains, modalities=count)
    shared = torch.cat([pinned_rows(k) for k in range(count)])
    specific = torch.cat([unit_rows(pinned_rows(k) + 0.5) for k in range(count)])
    told = {"temperature": 0.1}
    return (
        weighted_contrast(shared, pairs.label, pairs.across(across), **told),
        weighted_contrast(specific, pairs.label & pairs.modality, pairs.within(within), **told),
    )


def test_pinned_contrasts():
    across, within = (logits.requires_grad_() for logits in pair_logits())
    values = contrasts(across, within)
    close(torch.stack(values), 4.164755610276, 4.092504101988)
    sum(values).backward()
    norms = torch.stack([across.grad.norm(), within.grad.norm(), across.grad.reshape(6, 6)[0, 1]])
    close(norms, 0.035798781415, 0.010272164829, 0.002033456886)
    plain = contrasts(torch.zeros(3, 2, 3, 2).double(), torch.zeros(3, 2, 2).double())
    close(plain[0][None], 4.190511795076)


def test_pinned_contrasts_of_one_source():
    across = pair_logits()[0].reshape(6, 6)[:2, :2].reshape(2, 1, 2, 1)
    values = contrasts(across, torch.zeros(2, 1, 1).double(), count=2, domains=torch.zeros(6, dtype=torch.int64))
    close(torch.stack(values), 3.678661693422, 3.497878338804)


def vectors():
    """G_t[c] = cos(1 + 2t + 5c + t c)."""
    t, c = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(6.0, dtype=torch.float64)[None]
    return torch.cos(1 + 2 * t + 5 * c + t * c)


FIRST = (0.179660355079, 0.081154173428, -0.127354039326, -0.039091883797, -0.331409078616, -0.483466453641)
LAST = (0.212960759307, 0.117392316878, -0.183311551834, -0.167019005409, -0.363850713388, -0.353902470905)


def test_pinned_projections():
    g = vectors()
    gram = gram_matrix([[row] for row in g], shared=1)
    orders = torch.arange(4).expand(4, 4)
    shares = projected(gram, orders)
    close((shares @ g).norm(dim=1), 1.150407645934, 0.857945774131, 0.972550324929, 1.305145171257)
    close((shares @ g).mean(dim=0), *FIRST)
    close((projected(gram, orders.flip(1)) @ g).mean(dim=0), *LAST)


def test_pinned_projections_with_parameters_that_two_objectives_reach():
    g, nothing = vectors(), torch.zeros(2, dtype=torch.float64)
    two = torch.stack([double(1, -2), double(-1.5, 0.5), nothing, nothing])
    gram = gram_matrix([[row, of_two] for row, of_two in zip(g, two, strict=True)], shared=2)
    shares = projected(gram, torch.arange(4).expand(4, 4)).mean(dim=0)
    close(shares @ g, 0.191808071527, 0.056527400714, -0.068683249456, 0.102376817839, -0.277780343150, -0.591773248745)
    close(4 * shares @ two, -1.658330272310, -2.239532773503)
