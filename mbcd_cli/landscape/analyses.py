"""One checkpoint's analyses, each into its own resumable file.

Every function measures what its file still lacks and returns summary figures; nothing is drawn here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mbcd_cli.landscape.directions import Sphere
from mbcd_cli.landscape.hessian import Hessian, hutchinson_trace, spectral_density, top_eigenvalues
from mbcd_cli.landscape.objective import LossFunction
from mbcd_cli.landscape.sharpness import flatness_curve, worst_case
from mbcd_cli.landscape.store import Grid, GridStore, axis, load_arrays, read_grid, save_arrays
from mbcd_cli.landscape.surface import Advance, Share, fill_grid, fill_radii
from mbcd_cli.settings import LandscapeSettings

Watch = Callable[[str, int | None], AbstractContextManager[Advance]]


@dataclass(frozen=True, slots=True)
class Study:
    """What the analyses of one checkpoint share.

    Attributes:
        settings: the landscape slice.
        loss: the loss around the checkpoint.
        identity: what the measured values depend on, besides the analysis itself.
        folder, label: files are `folder/ANALYSIS-label.h5`.
        subject: what moves and on what it is measured, for titles.
        watch: (label, units of work or None) -> context manager of a progress callback.
        curvature_loss: builds the loss in the type that curvature asks for; default: `loss` itself.
        share: part of every grid that this process measures.
        overwrite: start anew instead of resuming.
        barrier: waits for the processes that share the grids.
    """

    settings: LandscapeSettings
    loss: LossFunction
    identity: Mapping[str, Any]
    folder: Path
    label: str
    subject: str
    watch: Watch
    curvature_loss: Callable[[], LossFunction] | None = None
    share: Share = field(default_factory=Share)
    overwrite: bool = False
    barrier: Callable[[], None] = lambda: None

    @property
    def sphere(self) -> Sphere:
        """Perturbations of radius 1."""
        return Sphere(self.loss.start, self.settings.normalisation, self.settings.biases)

    def file(self, analysis: str) -> Path:
        """Where `analysis` of this checkpoint is kept."""
        return file_of(self.folder, analysis, self.label)

    def centre(self) -> tuple[float, float]:
        """Loss and accuracy at the checkpoint."""
        loss, accuracy = self.loss.measure(self.loss.start).tolist()
        return loss, accuracy


def file_of(folder: Path, analysis: str, label: str) -> Path:
    """`folder/ANALYSIS-label.h5`, with characters that file names do not bear replaced."""
    safe = "".join(c if c.isalnum() or c in "-_.+" else "-" for c in label)
    return folder / f"{analysis}-{safe}.h5"


def _about(study: Study, centre: tuple[float, float], **more: Any) -> dict[str, Any]:
    centre_figures = {"centre_loss": centre[0], "centre_accuracy": centre[1]}
    distance = f"({study.settings.normalisation}-normalised)"
    return {"label": study.label, "subject": study.subject, "distance": distance, **centre_figures, **more}


def run_grid(
    study: Study,
    analysis: str,
    *,
    x: np.ndarray,
    y: np.ndarray,
    identity: Mapping[str, Any],
    about: Mapping[str, Any],
    fill: Callable[[GridStore, Advance], int],
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> Grid:
    """Open `analysis`' file, let `fill` measure what is missing, and read the whole back (on every rank)."""
    path = study.file(analysis)
    settings = {"x": x, "y": y, "identity": {**study.identity, **identity}, "about": about, "marks": marks}
    # Rank 0 owns the file, so it opens first; it folds the others' journals in when all are done.
    if study.share.rank != 0:
        study.barrier()
    with GridStore(path, **settings, rank=study.share.rank, overwrite=study.overwrite) as store:
        if study.share.rank == 0:
            study.barrier()
        with study.watch(f"{analysis} {study.label}", len(study.share.of(store.missing()))) as advance:
            fill(store, advance)
        study.barrier()
        if study.share.rank == 0 and study.share.world > 1:
            store.fold(ranks=True)
    study.barrier()
    return read_grid(path)


def _directions_identity(study: Study, analysis: str) -> dict[str, Any]:
    s = study.settings
    return {"analysis": analysis, "normalisation": s.normalisation, "biases": s.biases, "seed": s.seed}


def _axis_name(study: Study, number: int) -> str:
    return f"direction {number} ({study.settings.normalisation}-normalised)"


def run_surface(study: Study, centre: tuple[float, float]) -> dict[str, Any]:
    """2-D plane of two random directions (Li et al. 2018) -> summary."""
    s = study.settings
    coordinates = axis(s.span, s.points)
    directions = [study.sphere.sample(seed=s.seed, index=index) for index in (0, 1)]
    grid = run_grid(
        study,
        "surface",
        x=coordinates,
        y=coordinates,
        identity=_directions_identity(study, "surface"),
        about=_about(study, centre, x=_axis_name(study, 1), y=_axis_name(study, 2)),
        marks={study.label: (0.0, 0.0)},
        fill=lambda store, advance: fill_grid(store, study.loss, directions, share=study.share, advance=advance),
    )
    return _grid_summary(grid, centre)


def run_curve(study: Study, centre: tuple[float, float]) -> dict[str, Any]:
    """1-D line along one random direction -> summary."""
    s = study.settings
    direction = study.sphere.sample(seed=s.seed, index=0)
    grid = run_grid(
        study,
        "curve",
        x=axis(s.span, 4 * s.points - 1),
        y=np.zeros(1),
        identity=_directions_identity(study, "curve"),
        about=_about(study, centre, x=_axis_name(study, 1)),
        marks={study.label: (0.0, 0.0)},
        fill=lambda store, advance: fill_grid(store, study.loss, [direction], share=study.share, advance=advance),
    )
    return _grid_summary(grid, centre)


def _grid_summary(grid: Grid, centre: tuple[float, float]) -> dict[str, Any]:
    finite = grid.loss[np.isfinite(grid.loss)]
    return {
        "file": str(grid.path),
        "points": int(grid.computed.sum()),
        "non_finite": grid.non_finite,
        "missing": grid.missing,
        "mean_increase": float(finite.mean() - centre[0]) if len(finite) else None,
        "max_increase": float(finite.max() - centre[0]) if len(finite) else None,
    }


def run_flatness(study: Study, centre: tuple[float, float]) -> dict[str, Any]:
    """Mean loss increase over random directions of every radius (Cha et al. 2021) -> summary."""
    s = study.settings
    grid = run_grid(
        study,
        "flatness",
        x=np.array(sorted(set(s.radii))),
        y=np.arange(s.directions, dtype=float),
        identity=_directions_identity(study, "flatness"),
        about=_about(study, centre),
        fill=lambda store, advance: fill_radii(
            store, study.loss, study.sphere, seed=s.seed, share=study.share, advance=advance
        ),
    )
    curve = flatness_curve(grid, centre=centre[0])
    return {
        "file": str(grid.path),
        "radii": curve.radii.tolist(),
        "mean_increase": curve.mean.tolist(),
        "half_width_95": curve.half_width.tolist(),
        "accuracy": curve.accuracy.tolist(),
        "directions": curve.directions.tolist(),
        "non_finite": curve.non_finite,
    }


def run_worst_case(study: Study, centre: tuple[float, float]) -> dict[str, Any]:
    """Largest loss increase that gradient ascent finds at every radius -> summary."""
    s = study.settings

    def fill(store: GridStore, advance: Advance) -> int:
        todo = study.share.of(store.missing())
        for row, column in todo:
            loss, accuracy = worst_case(
                study.loss, study.sphere, radius=float(store.x[column]), steps=s.ascent_steps, seed=s.seed
            )
            store.record(int(row), int(column), loss, accuracy)
            advance(1)
        return len(todo)

    grid = run_grid(
        study,
        "worst_case",
        x=np.array(sorted(set(s.radii))),
        y=np.zeros(1),
        identity={**_directions_identity(study, "worst_case"), "ascent_steps": s.ascent_steps},
        about=_about(study, centre),
        fill=fill,
    )
    return {
        "file": str(grid.path),
        "radii": grid.x.tolist(),
        "increase": (grid.loss[0] - centre[0]).tolist(),
        "accuracy": grid.accuracy[0].tolist(),
        "non_finite": grid.non_finite,
    }


def run_curvature(study: Study, centre: tuple[float, float]) -> dict[str, Any]:
    """Top eigenvalues, trace and spectral density of the Hessian -> summary; a finished file is used as it is."""
    s = study.settings
    keys = ("seed", "eigenvalues", "tolerance", "trace_probes", "density_probes", "density_steps")
    identity = {
        **study.identity,
        "analysis": "curvature",
        **{key: getattr(s, key) for key in (*keys, "curvature_dtype", "exact_limit")},
    }
    path = study.file("curvature")
    if study.overwrite or not path.exists():
        if study.share.rank == 0:
            save_arrays(path, _curvature(study), identity=identity, about=_about(study, centre))
        study.barrier()
    arrays, _ = load_arrays(path, identity=identity)
    values = arrays["eigenvalues"]
    return {
        "file": str(path),
        "parameters": int(arrays["parameters"]),
        "eigenvalues": values.tolist(),
        "errors": arrays["errors"].tolist(),
        "converged": arrays["converged"].tolist(),
        "spectral_norm": float(np.abs(values).max()),
        "trace": float(arrays["trace"]),
        "trace_error": float(arrays["trace_error"]),
        "exact": bool(arrays["exact"]),
        "products": int(arrays["products"]),
    }


def _curvature(study: Study) -> dict[str, np.ndarray]:
    s = study.settings
    loss = study.curvature_loss() if study.curvature_loss is not None else study.loss
    with study.watch(f"curvature {study.label}", None) as advance:
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
