from __future__ import annotations

import numpy as np
import pytest
import torch
from landscape_cases import Quadratic, symmetric

from mbcd_cli.landscape.directions import Sphere
from mbcd_cli.landscape.sharpness import flatness_curve, gradient, worst_case
from mbcd_cli.landscape.store import GridStore, read_grid
from mbcd_cli.landscape.surface import fill_radii

EIGENVALUES = [0.5, 1.0, 2.0, 4.0, 8.0]


@pytest.fixture
def loss():
    return Quadratic(symmetric(EIGENVALUES), {"w": torch.zeros(1, 5, dtype=torch.float64)})


def curve(loss, path, radii, directions, centre=0.0):
    with GridStore(path, x=radii, y=np.arange(directions), identity={}) as store:
        fill_radii(store, loss, Sphere(loss.start, "absolute"), seed=0)
    return flatness_curve(read_grid(path), centre=centre)


def test_mean_increase_of_a_quadratic(loss, tmp_path):
    """Over random directions of length r, E[1/2 g^T A g] = r^2 trace(A) / (2 n)."""
    radii = [0.0, 1.0, 2.0]
    result = curve(loss, tmp_path / "f.h5", radii, 400)
    expected = np.square(radii) * sum(EIGENVALUES) / 10
    assert result.mean[0] == 0
    assert np.all(np.abs(result.mean - expected) <= 1.5 * result.half_width + 1e-12)
    # spread of g^T A g / |g|^2 over the sphere: 2 (n tr(A^2) - tr(A)^2) / (n^2 (n + 2))
    n, first, second = 5, sum(EIGENVALUES), sum(e * e for e in EIGENVALUES)
    deviation = 0.5 * np.sqrt(2 * (n * second - first**2) / (n**2 * (n + 2)))
    assert result.half_width[1] == pytest.approx(1.966 * deviation / 20, rel=0.1)
    assert result.directions.tolist() == [400, 400, 400]


def test_more_directions_reuse_the_first_ones(loss, tmp_path):
    curve(loss, tmp_path / "f.h5", [0.0, 1.0], 5)
    assert loss.calls == 10
    curve(loss, tmp_path / "f.h5", [0.0, 1.0, 2.0], 8)
    assert loss.calls == 24


def test_non_finite_directions_are_left_out_and_counted(tmp_path):
    path = tmp_path / "f.h5"
    with GridStore(path, x=[0.1, 0.2], y=np.arange(3), identity={}) as store:
        for row, losses in enumerate([(1.0, 2.0), (2.0, float("nan")), (3.0, float("inf"))]):
            for column, value in enumerate(losses):
                store.record(row, column, value, 0.5)
    result = flatness_curve(read_grid(path), centre=1.0)
    assert result.mean.tolist() == [1.0, 1.0]
    assert result.directions.tolist() == [3, 1]
    assert result.half_width[0] == pytest.approx(4.302653 * 1 / np.sqrt(3), rel=1e-5)  # t quantile, 2 degrees
    assert np.isnan(result.half_width[1])
    assert result.non_finite == 2


def test_worst_case_of_a_quadratic_is_the_top_eigenvalue(loss):
    """Around the minimum: max over |g| = r of 1/2 g^T A g = r^2 lambda_max / 2."""
    sphere = Sphere(loss.start, "absolute")
    values = [worst_case(loss, sphere, radius=radius, steps=60)[0] for radius in (0.0, 0.5, 1.0)]
    assert values == pytest.approx([0, 0.25 * 4, 4.0], rel=1e-4)
    # away from the minimum, where the gradient is not zero
    loss.start = {"w": torch.tensor([[1.0, -1.0, 0.5, 0.2, 2.0]], dtype=torch.float64)}
    found, _ = worst_case(loss, Sphere(loss.start, "absolute"), radius=0.7, steps=60)
    w, a = loss.start["w"][0].numpy(), loss.matrix.numpy()
    assert found == pytest.approx(_largest_on_sphere(a, w, 0.7), rel=1e-4)


def _largest_on_sphere(a, w, r):
    """max of 1/2 (w+g)^T A (w+g) over |g| = r, from the secular equation of the trust-region problem."""
    values, vectors = np.linalg.eigh(a)
    slope = vectors.T @ (a @ w)
    low, high = values[-1] + 1e-12, values[-1] + np.linalg.norm(slope) / r + 1
    for _ in range(200):  # |(mu - A)^-1 A w| falls with mu
        mu = (low + high) / 2
        low, high = (mu, high) if np.linalg.norm(slope / (mu - values)) > r else (low, mu)
    g = vectors @ (slope / (mu - values))
    return 0.5 * (w + g) @ a @ (w + g)


def test_worst_case_is_never_below_the_average(loss, tmp_path):
    loss.start = {"w": torch.full((1, 5), 0.3, dtype=torch.float64)}
    centre = loss.measure(loss.start)[0].item()
    mean = curve(loss, tmp_path / "f.h5", [0.4], 50, centre).mean[0]
    worst, _ = worst_case(loss, Sphere(loss.start, "absolute"), radius=0.4, steps=5)
    assert worst - centre > mean


def test_gradient_sums_the_terms(loss):
    at = {"w": torch.arange(5.0, dtype=torch.float64).reshape(1, 5)}
    np.testing.assert_allclose(
        gradient(loss.terms(), at)["w"][0].numpy(), loss.matrix.numpy() @ np.arange(5.0), rtol=1e-12
    )
