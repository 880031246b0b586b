"""Curvature of the loss at a checkpoint: Hessian-vector products, top eigenvalues, trace, spectral density.

Letters: n moving values, k wanted eigenvalues, m basis vectors, P random probes. Vectors are flat, float64
in and out of the operator; products are computed in the type of the weights, every recurrence in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mbcd_cli.landscape.directions import Vector, gaussian
from mbcd_cli.landscape.objective import BatchLoss
from mbcd_cli.landscape.surface import Advance

Product = Callable[[torch.Tensor], torch.Tensor]
_CHUNK = 1 << 20
_BASIS_BYTES = 4 << 30


class Hessian:
    """v -> H v for H the Hessian of the summed terms at `at`, by double backpropagation.

    Where the graphs of all terms' gradients fit into `graph_bytes` they are built once and kept, which saves the
    forward and the first backward pass of every product: without, 8 products take 1.32 times as long (the model of
    `tests/benchmarks/landscape_speed.py`, on and off in turns, one CPU thread). Else one term's graph is in memory at a
    time. Either way memory does not grow with the number of products.

    Args:
        terms: differentiable functions that sum to the loss.
        at: where, name -> tensor; n values in all.
        graph_bytes: memory for kept graphs; 0 keeps none.
    """

    def __init__(self, terms: Sequence[BatchLoss], at: Vector, *, graph_bytes: float = 2e9) -> None:
        self._terms = list(terms)
        self._leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in at.items()}
        self._sizes = [tensor.numel() for tensor in at.values()]
        self.names = tuple(at)
        self.n = sum(self._sizes)
        self.products = 0
        self._kept: list[list[torch.Tensor | None]] = []
        if self._terms and graph_bytes > 0:
            first, size = self._measured_gradient(self._terms[0])
            if size * len(self._terms) <= graph_bytes:
                self._kept = [first, *(self._gradient(term) for term in self._terms[1:])]

    @property
    def device(self) -> torch.device:
        """Where products are computed."""
        return next(iter(self._leaves.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Type in which products are computed."""
        return next(iter(self._leaves.values())).dtype

    def _gradient(self, term: BatchLoss) -> list[torch.Tensor | None]:
        return list(
            torch.autograd.grad(term(self._leaves), list(self._leaves.values()), create_graph=True, allow_unused=True)
        )

    def _measured_gradient(self, term: BatchLoss) -> tuple[list[torch.Tensor | None], int]:
        """The gradient with its graph, and the bytes that the graph keeps (each storage counted once)."""
        storages: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return self._gradient(term), sum(storages.values())

    def _split(self, v: torch.Tensor) -> list[torch.Tensor]:
        parts = v.to(self.dtype).split(self._sizes, dim=-1)
        return [p.reshape(*p.shape[:-1], *t.shape) for p, t in zip(parts, self._leaves.values(), strict=True)]

    def flat(self, vector: Vector) -> torch.Tensor:
        """Named tensors -> one float64 vector [n]."""
        return torch.cat([vector[name].double().reshape(-1) for name in self.names])

    def noise(self, *, seed: int, index: int) -> torch.Tensor:
        """The `index`-th standard normal vector of `seed`, [n] float64 (by name: see `directions.gaussian`)."""
        return self.flat(gaussian(self._leaves, seed=seed, index=index)).to(self.device)

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        """H v, [n] float64; v [b, n] gives the b products at once."""
        batched = v.dim() == 2
        total = torch.zeros(v.shape, dtype=torch.float64, device=self.device)
        parts = self._split(v)
        self.products += len(v) if batched else 1
        for number, term in enumerate(self._terms):
            slopes = self._kept[number] if self._kept else self._gradient(term)
            # A term that is linear in some tensors has a gradient without a graph there: no curvature.
            curved = [(s, p) for s, p in zip(slopes, parts, strict=True) if s is not None and s.requires_grad]
            if not curved:
                continue
            products = torch.autograd.grad(
                [s for s, _ in curved],
                list(self._leaves.values()),
                [p for _, p in curved],
                retain_graph=bool(self._kept),
                allow_unused=True,
                is_grads_batched=batched,
            )
            at = 0
            for product, size in zip(products, self._sizes, strict=True):
                if product is not None:
                    total[..., at : at + size] += product.reshape(*v.shape[:-1], size)
                at += size
        return total

    def matrix(self, *, chunk: int = 32, advance: Advance = lambda steps: None) -> torch.Tensor:
        """The whole Hessian [n, n] float64, symmetrised; for small n."""
        rows = []
        for begin in range(0, self.n, chunk):
            count = min(chunk, self.n - begin)
            unit = torch.zeros(count, self.n, dtype=torch.float64, device=self.device)
            unit[torch.arange(count), torch.arange(begin, begin + count)] = 1
            rows.append(self(unit))
            advance(count)
        whole = torch.cat(rows)
        return (whole + whole.T) / 2


class _Basis:
    """Up to m orthonormal vectors, allocated once; products with it are accumulated in float64, chunk by chunk."""

    def __init__(self, m: int, n: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.empty(m, n, dtype=dtype, device=device)

    def set(self, index: int, v: torch.Tensor) -> None:
        self.rows[index] = v

    def coefficients(self, count: int, w: torch.Tensor) -> torch.Tensor:
        """[count] inner products of the first vectors with w [n]."""
        total = torch.zeros(count, dtype=torch.float64, device=w.device)
        for begin in range(0, len(w), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            total += self.rows[:count, part].double() @ w[part]
        return total

    def orthogonalise(self, count: int, w: torch.Tensor) -> torch.Tensor:
        """Remove the span of the first vectors from w in place, twice (once is not enough); the coefficients."""
        coefficients = torch.zeros(count, dtype=torch.float64, device=w.device)
        for _ in range(2):
            overlaps = self.coefficients(count, w)
            for begin in range(0, len(w), _CHUNK):
                part = slice(begin, begin + _CHUNK)
                w[part] -= overlaps @ self.rows[:count, part].double()
            coefficients += overlaps
        return coefficients

    def rotate(self, matrix: torch.Tensor, count: int) -> None:
        """The first vectors become `matrix` [r, count] @ them."""
        for begin in range(0, self.rows.shape[1], _CHUNK):
            part = slice(begin, begin + _CHUNK)
            self.rows[: len(matrix), part] = (matrix @ self.rows[:count, part].double()).to(self.rows.dtype)


@dataclass(frozen=True, slots=True)
class Eigenpairs:
    """The k eigenvalues of largest magnitude.

    Attributes:
        values: [k], by falling magnitude.
        residuals: [k] ||H q - theta q||: an eigenvalue of H lies within this distance of each value.
        errors: [k] min(residual, residual^2 / gap), gap = distance to the nearest other Ritz value: the
            error where that neighbour is found (Kato-Temple).
        converged: [k] whether the error is below the tolerance times the value.
        vectors: [k, n] orthonormal.
        products: Hessian-vector products used.
    """

    values: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray
    converged: np.ndarray
    vectors: torch.Tensor
    products: int


def top_eigenvalues(
    product: Product,
    n: int,
    *,
    k: int = 1,
    tolerance: float = 1e-3,
    start: torch.Tensor,
    basis: int | None = None,
    max_products: int = 500,
    dtype: torch.dtype = torch.float64,
    advance: Advance = lambda steps: None,
) -> Eigenpairs:
    """Thick-restart Lanczos with full reorthogonalisation (Wu and Simon 2000): k eigenvalues of largest
    magnitude.

    Memory is one basis of m + 1 vectors, whatever the number of products.

    Args:
        product: v [n] float64 -> H v [n] float64, H symmetric.
        n: dimension.
        k: wanted eigenvalues, at most n.
        tolerance: relative error at which a value counts as converged.
        start: [n] random vector.
        basis: m, vectors kept before a restart; default max(2 k + 10, 20).
        max_products: products after which to give up; what is found then is returned, not converged.
        dtype: storage of the basis.
    """
    k = min(k, n)
    m = min(n, max(basis or max(2 * k + 10, 20), k + 2))
    vectors = _Basis(m + 1, n, dtype=dtype, device=start.device)
    vectors.set(0, start / start.norm())
    projected = np.zeros((m, m))
    used, j = 0, 0
    settled: np.ndarray | None = None
    while True:
        w = product(vectors.rows[j].double())
        used += 1
        advance(1)
        if not bool(torch.isfinite(w).all()):
            nothing = np.full(k, np.nan)
            return Eigenpairs(nothing, nothing, nothing, np.zeros(k, bool), vectors.rows[:0], used)
        size = float(w.norm())
        column = vectors.orthogonalise(j + 1, w).cpu().numpy()
        projected[: j + 1, j] = projected[j, : j + 1] = column
        beta = float(w.norm())
        ritz, s = np.linalg.eigh(projected[: j + 1, : j + 1])
        order = np.argsort(-np.abs(ritz))[:k]
        # Rounding leaves a remainder of this size where the true one is zero: the subspace is then invariant.
        floor = max(size, float(np.abs(ritz).max(initial=0))) * float(torch.finfo(dtype).eps) * 10
        exhausted = beta <= floor or j + 1 == n
        residuals = np.maximum(beta * np.abs(s[j, order]) * (not exhausted), floor)
        # No bound can be tighter than the rounding of the products.
        errors = np.maximum(_errors(ritz, order, residuals), floor)
        scale = np.maximum(np.abs(ritz[order]), floor)
        converged = (errors <= tolerance * scale) & (residuals <= np.sqrt(tolerance) * scale)
        done = len(order) == k and j >= k and bool(converged.all())
        if exhausted:
            # One start vector sees each multiple eigenvalue once: go on from fresh ones until they add nothing.
            done = done and settled is not None and np.allclose(settled, ritz[order], rtol=tolerance, atol=floor)
            settled = ritz[order] if len(order) == k else None
        done = done or j + 1 == n
        if done or used >= max_products:
            vectors.rotate(torch.from_numpy(s[:, order].T.copy()).to(start.device), j + 1)
            return Eigenpairs(ritz[order], residuals, errors, converged, vectors.rows[: len(order)], used)
        if exhausted:
            fresh = torch.randn(n, generator=torch.Generator().manual_seed(used), dtype=torch.float64)
            w = fresh.to(start.device)
            vectors.orthogonalise(j + 1, w)
            beta = float(w.norm())
        j += 1
        vectors.set(j, w / beta)
        if j == m:
            keep = min(k + max((m - k) // 2, 1), m - 1)
            kept = np.argsort(-np.abs(ritz))[:keep]
            vectors.rotate(torch.from_numpy(s[:, kept].T.copy()).to(start.device), m)
            vectors.set(keep, vectors.rows[m].clone())
            projected[:] = 0
            projected[:keep, :keep] = np.diag(ritz[kept])
            j = keep


def _errors(ritz: np.ndarray, order: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    errors = residuals.copy()
    for number, index in enumerate(order):
        others = np.delete(ritz, index)
        gap = np.abs(others - ritz[index]).min() if len(others) else 0.0
        if gap > 0:
            errors[number] = min(residuals[number], residuals[number] ** 2 / gap)
    return errors


@dataclass(frozen=True, slots=True)
class Trace:
    """Estimated trace; `error` is its standard error, `samples` [P] the single estimates."""

    value: float
    error: float
    samples: np.ndarray


def hutchinson_trace(
    product: Product,
    probes: Callable[[int], torch.Tensor],
    *,
    count: int,
    deflate: Eigenpairs | None = None,
    advance: Advance = lambda steps: None,
) -> Trace:
    """Hutchinson's estimate with Rademacher probes, E[z^T H z] = tr H.

    With `deflate`, the trace on the span Q of known eigenvectors is taken exactly (the Rayleigh quotients) and only the
    rest is estimated: tr H = tr Q^T H Q + E[(P z)^T H (P z)], P = 1 - Q Q^T, as in Hutch++ (Meyer et al. 2021). That is
    unbiased whether or not the eigenvectors are exact.

    Args:
        product: v [n] -> H v [n].
        probes: index -> standard normal vector [n]; its signs are the probe.
        count: P.
        deflate: known eigenpairs.
    """
    exact = 0.0
    if deflate is not None and len(deflate.vectors):
        rows = deflate.vectors.double()
        exact = float(np.sum(deflate.values))
    else:
        deflate = None
    samples = []
    for index in range(count):
        z = probes(index).sign()
        z[z == 0] = 1
        if deflate is not None:
            z = z - (rows @ z) @ rows
        samples.append(z @ product(z))
        advance(1)
    values = torch.stack(samples).cpu().numpy() + exact
    error = float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    return Trace(float(values.mean()), error, values)


@dataclass(frozen=True, slots=True)
class Quadrature:
    """Stochastic Lanczos quadrature of the spectral density: nodes and weights, both [P, m]; weights sum to
    1 per probe. Where the basis did not fit into memory converged nodes repeat, which the weights account for.
    """

    nodes: np.ndarray
    weights: np.ndarray

    def density(self, at: np.ndarray, *, width: float) -> np.ndarray:
        """Density at `at` [g], smoothed by Gaussians of standard deviation `width`; integrates to 1."""
        z = (at[:, None, None] - self.nodes) / width
        smooth = np.exp(-0.5 * z**2) / (width * np.sqrt(2 * np.pi))
        return (smooth * self.weights).sum(2).mean(1)


def spectral_density(
    product: Product,
    probes: Callable[[int], torch.Tensor],
    *,
    count: int,
    steps: int,
    dtype: torch.dtype = torch.float64,
    basis_bytes: float = _BASIS_BYTES,
    advance: Advance = lambda steps: None,
) -> Quadrature:
    """m-step Lanczos from each of P Gaussian probes (Ghorbani et al. 2019).

    Args:
        product: v [n] -> H v [n].
        probes: index -> standard normal vector [n].
        count, steps: P and m (at most n).
        dtype, basis_bytes: storage of the basis, and the memory above which it is not kept (no
            reorthogonalisation).
    """
    n = len(probes(0))
    steps = min(steps, n)
    full = steps * n * torch.empty((), dtype=dtype).element_size() <= basis_bytes
    basis = _Basis(steps if full else 0, n, dtype=dtype, device=probes(0).device)
    nodes, weights = np.zeros((count, steps)), np.zeros((count, steps))
    for probe in range(count):
        v = probes(probe)
        v, before, beta = v / v.norm(), None, 0.0
        alphas: list[float] = []
        betas: list[float] = []
        for step in range(steps):
            if full:
                basis.set(step, v)
            w = product(v)
            advance(1)
            size = float(w.norm())
            alphas.append(float(v @ w))
            w -= alphas[-1] * v
            if before is not None:
                w -= beta * before
            if full:
                basis.orthogonalise(step + 1, w)
            beta = float(w.norm())
            if not np.isfinite(beta) or beta <= size * float(torch.finfo(dtype).eps) * 10 or step + 1 == steps:
                break
            betas.append(beta)
            before, v = v, w / beta
        done = len(alphas)
        tridiagonal = np.diag(alphas) + np.diag(betas[: done - 1], 1) + np.diag(betas[: done - 1], -1)
        if np.isfinite(tridiagonal).all():
            values, s = np.linalg.eigh(tridiagonal)
            nodes[probe, :done], weights[probe, :done] = values, s[0] ** 2
        else:
            nodes[probe], weights[probe] = np.nan, np.nan
    return Quadrature(nodes, weights)
