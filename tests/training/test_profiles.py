"""Profiles of weight averages: the pinned numbers, and the recursion that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from mbcd_cli.errors import SettingsError
from mbcd_cli.training import profiles
from mbcd_cli.training.profiles import KEPT, WIDEST, PowerProfile, fitted, gamma_of, inner


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.972198602303), (0.1, 6.937203937602), (0.2, 1.826213779896)])
def test_pinned_exponents(sigma, gamma):
    assert gamma_of(sigma) == pytest.approx(gamma, abs=1e-11)
    g = gamma_of(sigma)
    assert np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(sigma, abs=1e-14)


def test_the_widest_profile_counts_all_steps_alike_and_others_are_refused():
    assert gamma_of(WIDEST) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(PowerProfile(5, 0.0).of_steps(7), [0.2] * 5 + [0, 0], atol=1e-15)
    assert gamma_of(0.2887) == 0  # as the message says it
    for sigma in (0.0, -0.1, 1e-300, 0.29, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="width"):
            gamma_of(sigma)


def test_pinned_inner_product():
    two = PowerProfile(500, gamma_of(0.05)), PowerProfile(1000, gamma_of(0.1))
    products = inner(two, two)
    assert 1000 * products[0, 1] == pytest.approx(0.046730342711, abs=1e-12)
    np.testing.assert_allclose(products, products.T, rtol=1e-14)


def test_the_inner_product_is_the_integral():
    a, b = PowerProfile(30, 3.5), PowerProfile(40, 1.25)
    s = (np.arange(400_000) + 0.5) * 1e-4

    def density(one):
        return np.where(s <= one.t, (one.gamma + 1) * s**one.gamma / one.t ** (one.gamma + 1), 0)

    assert inner([a], [b])[0, 0] == pytest.approx(float((density(a) * density(b)).sum() * 1e-4), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 16.97])
def test_the_steps_count_what_the_recursion_gives_them(gamma):
    weights = np.zeros(23)
    for step in range(1, 20):
        kept = (1 - 1 / step) ** (gamma + 1)
        weights *= kept
        weights[step - 1] += 1 - kept
    np.testing.assert_allclose(PowerProfile(19, gamma).of_steps(23), weights, atol=1e-15)


def pairs(times):
    return [PowerProfile(t, gamma_of(sigma)) for sigma in KEPT for t in times]


def free(snapshots, wanted):
    return np.linalg.solve(inner(snapshots, snapshots), inner(snapshots, [wanted])[:, 0])


def test_pinned_weights(monkeypatch):
    """Without the demand that they sum to 1; a plain solve, and ours."""
    pinned = {
        (1000,): [0.35455513, 0.68133971],
        (250, 500, 750, 1000): [
            *(0.000000056068, 0.000132321065, 0.011707622112, 0.340082049156),
            *(-0.000001002261, -0.000796551812, -0.045150685196, 0.704899046260),
        ],
    }
    solved = []
    plain = profiles._solved
    monkeypatch.setattr(profiles, "_solved", lambda *system: solved.append(plain(*system)) or solved[-1])
    for times, expected in pinned.items():
        wanted = PowerProfile(1000, gamma_of(0.075))
        _, fit = fitted(pairs(times), wanted)
        ours, _ = solved[-2:]
        np.testing.assert_allclose(ours, expected, atol=5e-9 if len(times) == 1 else 1e-11)
        np.testing.assert_allclose(ours, free(pairs(times), wanted), atol=1e-11)
        assert fit.free_sum == pytest.approx(sum(expected), abs=1e-7)


MEASURED = {
    0.075: {1: (0.069, 1.036), 4: (0.038, 1.011), 8: (0.012, 1.001), 32: (0.001, None)},
    0.15: {1: (0.222, 0.849), 4: (0.100, None), 8: (0.034, None), 32: (0.003, None)},
    0.2: {1: (0.434, None), 4: (0.200, None), 8: (0.079, None), 32: (0.007, None)},
    0.03: {1: (0.361, None), 4: (0.271, None), 8: (0.124, None), 32: (0.010, None)},
}
"""Width -> how many pairs over 4,000 steps -> L1 distance and sum of the weights, as the supplement measured them."""


@pytest.mark.parametrize("sigma", MEASURED)
def test_pinned_distances_and_what_a_sum_of_one_costs(sigma):
    for count, (distance, total) in MEASURED[sigma].items():
        weights, fit = fitted(
            pairs([4000 * (k + 1) // count for k in range(count)]), PowerProfile(4000, gamma_of(sigma))
        )
        assert fit.free_distance == pytest.approx(distance, abs=6e-4)
        assert total is None or fit.free_sum == pytest.approx(total, abs=6e-4)
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        if count >= 8:
            assert fit.distance - fit.free_distance < 0.01


def test_a_profile_that_was_kept_is_itself():
    for place, sigma in enumerate(KEPT):
        weights, fit = fitted(pairs([10, 20, 30]), PowerProfile(30, gamma_of(sigma)))
        assert fit.distance < 1e-9
        assert weights[3 * place + 2] == pytest.approx(1, abs=1e-9)


def test_hundreds_of_snapshots_are_no_trouble():
    weights, fit = fitted(pairs(range(50, 10_001, 50)), PowerProfile(10_000, gamma_of(0.15)))
    assert fit.distance < 1e-3
    assert max(map(abs, weights)) < 2
