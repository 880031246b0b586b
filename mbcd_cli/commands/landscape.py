"""`mbcd landscape`: measure the loss around checkpoints, keep it in HDF5 files, draw it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbcd_cli import console
from mbcd_cli.errors import SettingsError
from mbcd_cli.evaluation.evaluator import SOURCE, TARGET, build_models, clip_sets, source_domains
from mbcd_cli.landscape import analyses, plots
from mbcd_cli.landscape.analyses import Study
from mbcd_cli.landscape.directions import moving_names
from mbcd_cli.landscape.objective import ModelObjective
from mbcd_cli.landscape.surface import Advance
from mbcd_cli.model import MultiModalModel
from mbcd_cli.runtime import pick_device
from mbcd_cli.settings import LandscapeSettings, Settings

ANALYSES: dict[str, Callable[[Study, tuple[float, float]], dict[str, Any]]] = {
    "surface": analyses.run_surface,
    "curve": analyses.run_curve,
    "flatness": analyses.run_flatness,
    "worst_case": analyses.run_worst_case,
    "curvature": analyses.run_curvature,
}


def landscape(
    settings: Settings,
    dataset: Any,
    checkpoints: Sequence[tuple[str, Any]],
    *,
    output: Path,
    device: torch.device | None = None,
    plot_only: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure the landscape around every checkpoint and write files and plots under `output`.

    Args:
        settings: the run's, with the landscape slice to use now.
        dataset: prepared, matching `settings`.
        checkpoints: (label, checkpoint) pairs; labels are distinct.
        output: folder of the HDF5 files and plots.
        device: where to compute; default: what `settings.runtime` says.
        plot_only: draw again from the files alone.
        overwrite: measure anew instead of resuming.

    Returns:
        JSON-able: `data`, `checkpoints` (label -> loss, accuracy and each analysis' summary), `files` (name
        -> path).

    Raises:
        SettingsError: groups, clips or weights that do not exist.
        StoreError: a file under `output` was measured on something else, or is damaged.
    """
    output, checkpoints = Path(output), dict(checkpoints)
    device = device or pick_device(settings.runtime)
    chosen = settings.landscape
    result: dict[str, Any] = {"checkpoints": {}, "analyses": list(chosen.analyses)}
    if not plot_only:
        clips = _clips(settings, dataset)
        result["data"] = {"clips": len(clips), "set": chosen.data, "loss": chosen.loss, "group": chosen.group}
        for label, checkpoint in checkpoints.items():
            study = _study(settings, dataset, label, checkpoint, clips, output, device, overwrite)
            centre = study.centre()
            figures = {name: ANALYSES[name](study, centre) for name in chosen.analyses}
            result["checkpoints"][label] = {"loss": centre[0], "accuracy": centre[1], **figures}
    files = _draw(list(checkpoints), output)
    if plot_only and not files:
        raise SettingsError(f"There is nothing to draw in {output}.", "Run `mbcd landscape` without --plot-only first.")
    result["files"] = {name: str(path) for name, path in files.items()}
    return result


def _clips(settings: Settings, dataset: Any) -> np.ndarray:
    """The clips to measure on: at most `max_clips`, drawn evenly from the table."""
    chosen = settings.landscape
    if chosen.data == "train":
        clips = dataset.select(domains=source_domains(settings, dataset), splits=("train",))
    else:
        wanted = SOURCE if chosen.data == "validation" else TARGET
        clips = next((s.clips for s in clip_sets(settings, dataset) if s.name == wanted), [])
    if len(clips) == 0:
        raise SettingsError(
            f"landscape.data: there are no {chosen.data} clips.", "Choose validation, target or train clips that exist."
        )
    return _evenly(np.asarray(clips), chosen.max_clips)


def _evenly(clips: np.ndarray, limit: int | None) -> np.ndarray:
    if limit is None or limit >= len(clips):
        return clips
    return clips[np.linspace(0, len(clips) - 1, limit).round().astype(int)]


def _centre_model(
    settings: Settings, dataset: Any, label: str, checkpoint: Any, device: torch.device
) -> MultiModalModel:
    models = build_models(settings, dataset, checkpoint, device=device, source=label)
    wanted = settings.landscape.weights
    if wanted == "deployed":
        return next(iter(models.values()))
    if wanted not in models:
        raise SettingsError(
            f"landscape.weights: checkpoint {label} has no {wanted}.",
            "It was trained without one; choose deployed or student.",
        )
    return models[wanted]


def _study(
    settings: Settings,
    dataset: Any,
    label: str,
    checkpoint: Any,
    clips: np.ndarray,
    output: Path,
    device: torch.device,
    overwrite: bool,
) -> Study:
    chosen = settings.landscape
    model = _centre_model(settings, dataset, label, checkpoint, device)
    calibration = np.zeros(0, dtype=np.int64)
    identity: dict[str, Any] = {
        "weights": _digest(model),
        "clips": hashlib.sha256(np.ascontiguousarray(clips, dtype=np.int64).tobytes()).hexdigest()[:16],
        "data": chosen.data,
        "fingerprints": dict(dataset.fingerprints),
        "group": chosen.group,
        "loss": chosen.loss,
        "batch_norm": chosen.batch_norm,
    }
    if chosen.batch_norm == "recalibrated":
        train = dataset.select(domains=source_domains(settings, dataset), splits=("train",))
        calibration = _evenly(np.asarray(train), chosen.max_clips)
        identity |= {"calibration_clips": chosen.max_clips, "batch_size": chosen.batch_size}

    def objective(dtype: torch.dtype) -> ModelObjective:
        return ModelObjective(
            model=model,
            batches=_batches(dataset, clips, chosen),
            names=moving_names(model, group=chosen.group, loss=chosen.loss),
            loss=chosen.loss,
            batch_norm=chosen.batch_norm,
            calibration=_batches(dataset, calibration, chosen),
            device=device,
            dtype=dtype,
            points_per_pass=chosen.points_per_pass,
        )

    loss = objective(torch.float32)
    precise = (lambda: objective(torch.float64)) if chosen.curvature_dtype == "float64" else None
    return Study(
        settings=chosen,
        loss=loss,
        identity=identity,
        folder=output,
        label=label,
        subject=f"{chosen.group} parameters, {chosen.data} clips",
        watch=_watch,
        curvature_loss=precise,
        overwrite=overwrite,
    )


def _batches(dataset: Any, clips: np.ndarray, chosen: LandscapeSettings) -> Iterable[Any]:
    return dataset.batches(clips, batch_size=chosen.batch_size, training=False)


def _digest(model: MultiModalModel) -> str:
    """Names the weights (and running statistics), wherever the checkpoint lies."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _watch(label: str, points: int | None) -> Iterator[Advance]:
    with console.progress(label, total=points) as ticker:
        yield ticker.advance


def _draw(labels: list[str], output: Path) -> dict[str, Path]:
    """Every plot whose files are there."""
    have = {
        name: {label: path for label in labels if (path := analyses.file_of(output, name, label)).exists()}
        for name in ANALYSES
    }
    files = {f"{name} of {label}": path for name, found in have.items() for label, path in found.items()}
    if have["surface"]:
        files["surface plot"] = plots.plot_surfaces(have["surface"], output / "surface.png")
        files["surface plot in 3-D"] = plots.plot_surfaces_3d(have["surface"], output / "surface-3d.png")
    if have["curve"]:
        files["curve plot"] = plots.plot_curves(have["curve"], output / "curve.png")
    if have["flatness"] or have["worst_case"]:
        files["flatness plot"] = plots.plot_flatness(
            have["flatness"], output / "flatness.png", worst=have["worst_case"]
        )
    if have["curvature"]:
        files["spectrum plot"] = plots.plot_spectra(have["curvature"], output / "spectrum.png")
    return files


def show(result: Mapping[str, Any]) -> None:
    """Print what `landscape` returned: one table, then the paths."""
    rows = []
    curvature = []
    for label, figures in result["checkpoints"].items():
        if "curvature" in figures:
            found = figures["curvature"]
            top = f"{found['eigenvalues'][0]:.4g} ± {found['errors'][0]:.1g}"
            trace = f"{found['trace']:.4g} ± {found['trace_error']:.1g}"
            settled = f"{sum(found['converged'])} of {len(found['converged'])}"
            curvature.append([label, top, trace, settled, found["parameters"]])
        flat = figures.get("flatness", {})
        rows.append(
            [
                label,
                f"{figures['loss']:.4f}",
                f"{100 * figures['accuracy']:.1f} %",
                _last(flat.get("mean_increase"), flat.get("half_width_95")),
                _last(figures.get("worst_case", {}).get("increase")),
                sum(f.get("non_finite", 0) for f in figures.values() if isinstance(f, Mapping)),
            ]
        )
    if rows:
        columns = ["checkpoint", "loss", "accuracy", "mean increase", "worst increase", "non-finite points"]
        console.table("Landscape (increases at the largest radius)", columns, rows)
    if curvature:
        columns = ["checkpoint", "top eigenvalue", "trace", "converged", "parameters"]
        console.table("Curvature (Hessian of the loss)", columns, curvature)
    for name, path in result["files"].items():
        console.out.print(f"{name}: {path}", markup=False)


def _last(values: list[float] | None, half: list[float] | None = None) -> str:
    if not values:
        return "-"
    return f"{values[-1]:.4f}" + (f" ± {half[-1]:.4f}" if half else "")
