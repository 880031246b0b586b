from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from landscape_cases import Quadratic, symmetric
from scipy import stats

from mbcd_cli.landscape.directions import gaussian, moving_names
from mbcd_cli.landscape.hessian import Hessian, hutchinson_trace, spectral_density, top_eigenvalues
from mbcd_cli.landscape.objective import ModelObjective

SPECTRUM = np.concatenate([[-30.0, 20.0, 19.0], np.linspace(-3, 5, 57)])


def matrix_product(matrix):
    a = torch.as_tensor(matrix)
    return lambda v: a @ v


def start(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probes(n):
    return lambda index: start(n, 1000 + index)


@pytest.fixture
def small(model, dataset):
    """A network's fused head alone has few enough values for the whole Hessian; in float64."""

    def build(group="all", **options):
        batches = list(dataset.batches(np.arange(50), batch_size=17, training=False))
        names = moving_names(model, group=group)
        return ModelObjective(model=model, batches=batches, names=names, dtype=torch.float64, **options)

    return build


def full_hessian(objective):
    """By torch.func.hessian of the loss over all names at once."""
    names = list(objective.start)
    terms = objective.terms()
    blocks = torch.func.hessian(lambda p: sum(t(p) for t in terms))(dict(objective.start))
    sizes = [objective.start[n].numel() for n in names]
    rows = [
        torch.cat([blocks[a][b].reshape(sizes[i], sizes[j]) for j, b in enumerate(names)], 1)
        for i, a in enumerate(names)
    ]
    return torch.cat(rows).numpy()


def moment(density, power: int) -> float:
    """Estimate of tr(H^power) / n."""
    return float((density.weights * density.nodes**power).sum(1).mean())


@pytest.mark.parametrize("group", ["fused_head", "audio"])
@pytest.mark.parametrize("graph_bytes", [0, 1e9])
def test_products_and_matrix_are_those_of_torch_func(small, group, graph_bytes):
    objective = small(group)
    expected = full_hessian(objective)
    assert np.abs(expected).max() > 1e-3
    hessian = Hessian(objective.terms(), objective.start, graph_bytes=graph_bytes)
    v = start(hessian.n)
    np.testing.assert_allclose(hessian(v).numpy(), expected @ v.numpy(), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(hessian.matrix(chunk=13).numpy(), expected, rtol=1e-8, atol=1e-10)


def test_top_eigenvalues_of_a_network(small):
    objective = small("fused_head")
    values = np.linalg.eigvalsh(full_hessian(objective))
    expected = values[np.argsort(-np.abs(values))][:3]
    hessian = Hessian(objective.terms(), objective.start)
    found = top_eigenvalues(hessian, hessian.n, k=3, tolerance=1e-6, start=hessian.noise(seed=0, index=0))
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    assert found.converged.all()


def test_float32_products_reach_the_tolerance(model, dataset, small):
    values = np.linalg.eigvalsh(full_hessian(small("fused_head")))
    batches = list(dataset.batches(np.arange(50), batch_size=17, training=False))
    objective = ModelObjective(model=model, batches=batches, names=moving_names(model, group="fused_head"))
    hessian = Hessian(objective.terms(), objective.start)
    found = top_eigenvalues(
        hessian, hessian.n, k=2, tolerance=1e-4, start=hessian.noise(seed=0, index=0), dtype=torch.float32
    )
    np.testing.assert_allclose(found.values, values[np.argsort(-np.abs(values))][:2], rtol=1e-3)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("basis", [None, 12])
def test_known_spectrum_with_restarts_and_bounds(k, basis):
    matrix = symmetric(SPECTRUM)
    exact = SPECTRUM[np.argsort(-np.abs(SPECTRUM))][:k]
    found = top_eigenvalues(matrix_product(matrix), 60, k=k, tolerance=1e-5, start=start(60), basis=basis)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, exact, rtol=1e-5)
    for value, residual, vector in zip(found.values, found.residuals, found.vectors.numpy(), strict=True):
        assert np.linalg.norm(matrix @ vector - value * vector) == pytest.approx(residual, rel=1e-2, abs=1e-9)
        assert np.abs(SPECTRUM - value).min() <= residual + 1e-9
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(k), atol=1e-9)


def test_early_stopping_is_told():
    found = top_eigenvalues(
        matrix_product(symmetric(SPECTRUM)), 60, k=5, tolerance=1e-9, start=start(60), max_products=9
    )
    assert found.products == 9
    assert not found.converged.all()


@pytest.mark.parametrize(
    "spectrum",
    [np.array([2.0]), np.array([3.0, -1.0]), np.zeros(6), np.full(7, 2.5), np.r_[np.full(4, 5.0), np.ones(9)]],
)
def test_degenerate_spectra(spectrum):
    k = min(4, len(spectrum))
    found = top_eigenvalues(matrix_product(symmetric(spectrum)), len(spectrum), k=k, start=start(len(spectrum)))
    np.testing.assert_allclose(found.values, spectrum[np.argsort(-np.abs(spectrum))][:k], rtol=1e-6, atol=1e-12)


def test_non_finite_products_end_the_search():
    found = top_eigenvalues(lambda v: v * float("nan"), 9, k=2, start=start(9))
    assert np.isnan(found.values).all()
    assert not found.converged.any()


def test_trace_is_within_its_standard_error_and_deflation_lowers_it():
    matrix = symmetric(SPECTRUM)
    plain = hutchinson_trace(matrix_product(matrix), probes(60), count=300)
    assert abs(plain.value - SPECTRUM.sum()) < 3 * plain.error
    # variance of z^T A z for Rademacher z: 2 sum_{i != j} a_ij^2
    variance = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2))
    assert plain.error == pytest.approx(np.sqrt(variance / 300), rel=0.15)
    top = top_eigenvalues(matrix_product(matrix), 60, k=3, start=start(60))
    deflated = hutchinson_trace(matrix_product(matrix), probes(60), count=300, deflate=top)
    assert abs(deflated.value - SPECTRUM.sum()) < 3 * deflated.error
    assert deflated.error < plain.error / 2
    # a diagonal matrix needs one probe only
    diagonal = hutchinson_trace(matrix_product(np.diag(SPECTRUM)), probes(60), count=2)
    assert diagonal.value == pytest.approx(SPECTRUM.sum(), abs=1e-10)


@pytest.mark.parametrize("basis_bytes", [4e9, 0])
def test_spectral_density(basis_bytes):
    matrix = symmetric(SPECTRUM)
    found = spectral_density(matrix_product(matrix), probes(60), count=60, steps=40, basis_bytes=basis_bytes)
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-9)
    assert moment(found, 1) == pytest.approx(SPECTRUM.mean(), abs=0.5)
    assert moment(found, 2) == pytest.approx(np.mean(SPECTRUM**2), rel=0.2)
    at = np.linspace(-40, 30, 701)
    density = found.density(at, width=1.0)
    assert np.trapezoid(density, at) == pytest.approx(1, abs=1e-3)
    exact = stats.norm(SPECTRUM[:, None], 1.0).pdf(at).mean(0)
    assert np.trapezoid(np.abs(density - exact), at) < 0.15


def test_quadrature_is_exact_for_low_moments_of_one_probe():
    """Gauss quadrature with m nodes is exact for polynomials up to degree 2 m - 1."""
    matrix = symmetric(SPECTRUM)
    v = probes(60)(0).numpy()
    v /= np.linalg.norm(v)
    found = spectral_density(matrix_product(matrix), probes(60), count=1, steps=4)
    for power in range(8):
        assert moment(found, power) == pytest.approx(v @ np.linalg.matrix_power(matrix, power) @ v, rel=1e-9)


def test_same_seed_same_result(small):
    def once():
        objective = small("fused_head")
        hessian = Hessian(objective.terms(), objective.start)
        found = top_eigenvalues(hessian, hessian.n, k=2, start=hessian.noise(seed=3, index=0))
        trace = hutchinson_trace(hessian, lambda i: hessian.noise(seed=3, index=i), count=4)
        return found.values.tolist(), trace.samples.tolist()

    assert once() == once()


def test_memory_does_not_grow_over_products(small):
    for graph_bytes in (0, 1e9):
        objective = small("fused_head")
        hessian = Hessian(objective.terms(), objective.start, graph_bytes=graph_bytes)
        v = start(hessian.n)

        def tensors():
            gc.collect()
            return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

        hessian(v)
        before = tensors()
        for _ in range(5):
            hessian(v)
        assert tensors() <= before


def test_quadratic_loss_whose_terms_share_the_hessian():
    loss = Quadratic(symmetric([1.0, 2.0, 7.0]), {"a": torch.ones(2).double(), "b": torch.ones(1).double()})
    hessian = Hessian(loss.terms(), loss.start)
    np.testing.assert_allclose(hessian.matrix().numpy(), loss.matrix, rtol=1e-12)
    flat = hessian.flat(gaussian(loss.start, seed=0, index=0))
    assert torch.equal(flat, hessian.noise(seed=0, index=0))


def test_a_linear_loss_has_no_curvature():
    hessian = Hessian([lambda p: p["a"].sum()], {"a": torch.ones(3).double()})
    assert hessian(torch.ones(3).double()).tolist() == [0, 0, 0]
