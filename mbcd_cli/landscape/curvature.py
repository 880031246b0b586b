"""A checkpoint's curvature into its own file: eigenvalues, trace and spectral density, or the exact spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbcd_cli.landscape.analyses import Measured, Study, about_of
from mbcd_cli.landscape.hessian import Hessian, hutchinson_trace, spectral_density, top_eigenvalues
from mbcd_cli.landscape.store import load_arrays, save_arrays
from mbcd_cli.landscape.surface import Advance


@dataclass(frozen=True, slots=True)
class CurvatureFigures(Measured):
    """Of the Hessian: eigenvalues with their errors, trace with its error, Hessian-vector products that it took."""

    parameters: int
    eigenvalues: list[float]
    errors: list[float]
    converged: list[bool]
    spectral_norm: float
    trace: float
    trace_error: float
    exact: bool
    products: int


def run_curvature(study: Study, centre: tuple[float, float]) -> CurvatureFigures:
    """Top eigenvalues, trace and spectral density of the Hessian -> summary; a finished file is used as it is."""
    s = study.settings
    keys = ("seed", "eigenvalues", "tolerance", "trace_probes", "density_probes", "density_steps")
    identity = {
        **study.identity,
        "analysis": "curvature",
        **{key: getattr(s, key) for key in (*keys, "curvature_dtype", "exact_limit")},
    }
    path = study.file("curvature")
    if study.group.main and (study.overwrite or not path.exists()):
        save_arrays(path, _curvature(study), identity=identity, about=about_of(study, centre))
    study.group.barrier()
    arrays, _ = load_arrays(path, identity=identity)
    values = arrays["eigenvalues"]
    return CurvatureFigures(
        file=str(path),
        parameters=int(arrays["parameters"]),
        eigenvalues=values.tolist(),
        errors=arrays["errors"].tolist(),
        converged=arrays["converged"].tolist(),
        spectral_norm=float(np.abs(values).max()),
        trace=float(arrays["trace"]),
        trace_error=float(arrays["trace_error"]),
        exact=bool(arrays["exact"]),
        products=int(arrays["products"]),
    )


def _curvature(study: Study) -> dict[str, np.ndarray]:
    s = study.settings
    loss = study.curvature_loss() if study.curvature_loss is not None else study.loss
    with study.say.progress(f"curvature {study.label}") as ticker:
        advance = ticker.advance
        hessian = Hessian(loss.terms(), loss.start)
        if hessian.n <= s.exact_limit:
            return _exact_curvature(hessian, s.eigenvalues, advance)
        top = top_eigenvalues(
            hessian,
            hessian.n,
            k=s.eigenvalues,
            tolerance=s.tolerance,
            start=hessian.noise(seed=s.seed, index=0),
            dtype=hessian.dtype,
            advance=advance,
        )
        trace = hutchinson_trace(
            hessian,
            lambda index: hessian.noise(seed=s.seed, index=1 + index),
            count=s.trace_probes,
            deflate=top,
            advance=advance,
        )
        arrays = {
            "eigenvalues": top.values,
            "residuals": top.residuals,
            "errors": top.errors,
            "converged": top.converged,
            "trace": trace.value,
            "trace_error": trace.error,
            "trace_samples": trace.samples,
        }
        if s.density_probes:
            density = spectral_density(
                hessian,
                lambda index: hessian.noise(seed=s.seed, index=1_000_000 + index),
                count=s.density_probes,
                steps=s.density_steps,
                dtype=hessian.dtype,
                advance=advance,
            )
            arrays |= {"nodes": density.nodes, "weights": density.weights}
    return {**arrays, "parameters": hessian.n, "products": hessian.products, "exact": False}


def _exact_curvature(hessian: Hessian, k: int, advance: Advance) -> dict[str, np.ndarray]:
    """The whole spectrum; as a quadrature it is one probe with equal weights."""
    matrix = hessian.matrix(advance=advance).cpu().numpy()
    n = hessian.n
    spectrum = np.linalg.eigvalsh(matrix) if np.isfinite(matrix).all() else np.full(n, np.nan)
    top = spectrum[np.argsort(-np.abs(spectrum))][:k]
    return {
        "eigenvalues": top,
        "residuals": np.zeros(len(top)),
        "errors": np.zeros(len(top)),
        "converged": np.isfinite(top),
        "trace": np.sum(spectrum),
        "trace_error": 0.0,
        "trace_samples": np.sum(spectrum)[None],
        "nodes": spectrum[None],
        "weights": np.full((1, n), 1 / n),
        "parameters": n,
        "products": hessian.products,
        "exact": True,
    }
