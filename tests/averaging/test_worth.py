"""What an average is worth over another, by hand."""

from __future__ import annotations

import pytest

from mbcd_cli.averaging.worth import TRAINED, Worth, gain


def worth(average, domain, seed, target):
    figures = {"source": 90.0, "increase": 0.1, "worst": 1.0}
    return Worth(average=average, method="erm", domain=domain, seed=seed, target=target, **figures)


TRAININGS = [worth(TRAINED, d, s, t) for d, s, t in [("a", 0, 50), ("b", 0, 70), ("a", 1, 54), ("b", 1, 72)]]


def test_a_gain_is_over_the_same_target_and_seed_as_trained():
    """Seed 0: +4 and +2, so 3; seed 1: +1 and -1, so 0."""
    better = [worth("better", d, s, t) for d, s, t in [("a", 0, 54), ("b", 0, 72), ("a", 1, 55), ("b", 1, 71)]]
    found = gain([*TRAININGS, *better], "better")
    assert found.value == pytest.approx(1.5)
    assert found.variance == pytest.approx(4.5 / 2)
    assert found.freedom == 1
    assert gain([*TRAININGS, *better], TRAINED) is None


def test_a_soup_is_compared_with_the_mean_of_its_runs():
    """+3 over the mean of 50 and 54, +1 over that of 70 and 72; no interval."""
    soups = [worth("soup", "a", None, 55), worth("soup", "b", None, 72)]
    found = gain([*TRAININGS, *soups], "soup")
    assert (found.value, found.freedom) == (pytest.approx(2.0), 0)
