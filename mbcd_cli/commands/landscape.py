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
from mbcd_cli.commands.online import attach_trunks
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import SettingsError
from mbcd_cli.evaluation.evaluator import SOURCE, TARGET, build_models, clip_sets, source_domains
from mbcd_cli.landscape import analyses, plots
from mbcd_cli.landscape.analyses import Study
from mbcd_cli.landscape.connections import Ends, run_path, run_plane, run_trajectory
from mbcd_cli.landscape.curvature import run_curvature
from mbcd_cli.landscape.directions import moving_names
from mbcd_cli.landscape.objective import ModelObjective
from mbcd_cli.landscape.paths import buffers_of, vector_of
from mbcd_cli.landscape.store import load_arrays, read_grid
from mbcd_cli.landscape.surface import Advance
from mbcd_cli.model import MultiModalModel
from mbcd_cli.processes import Group, joined
from mbcd_cli.runtime import pick_device
from mbcd_cli.settings import Settings

ANALYSES: dict[str, Callable[[Study, tuple[float, float]], dict[str, Any]]] = {
    "surface": analyses.run_surface,
    "curve": analyses.run_curve,
    "flatness": analyses.run_flatness,
    "worst_case": analyses.run_worst_case,
    "curvature": run_curvature,
}
CONNECTIONS = ("path", "plane", "trajectory")


def landscape(
    settings: Settings,
    dataset: Dataset,
    checkpoints: Sequence[tuple[str, Any]],
    *,
    output: Path,
    towards: Sequence[tuple[str, Any]] = (),
    epochs: Sequence[tuple[int, Any]] = (),
    device: torch.device | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure the landscape around every checkpoint and write files and plots under `output`.

    Args:
        settings: the run's, with the landscape slice to use now.
        dataset: prepared, matching `settings`.
        checkpoints: (label, checkpoint) pairs; labels are distinct.
        output: folder of the HDF5 files and plots.
        towards: one or two more checkpoints: paths from the first of `checkpoints` to each, and the plane
            through all.
        epochs: (epoch, checkpoint) pairs of the first checkpoint's training: its trajectory in the plane of
            their principal components.
        device: where to compute; default: what `settings.runtime` says.
        overwrite: measure anew instead of resuming.

    Returns:
        JSON-able: `data`, `checkpoints` (label -> loss, accuracy and each analysis' summary), `paths`
        (label -> summary), `plane`, `trajectory`, `files` (name -> path), `rank` (under torchrun only rank
        0 draws, and only it should print).

    Raises:
        SettingsError: groups, clips or weights that do not exist.
        CheckpointError: a checkpoint of another model.
        StoreError: a file under `output` was measured on something else, or is damaged.
    """
    output = Path(output)
    # Processes exchange nothing but barriers, so gloo serves those with GPUs too; all wait while rank 0 computes alone.
    with joined(torch.device("cpu"), say=console.say, patience=86400.0) as group:
        bench = _Bench(settings, dataset, output, device or pick_device(settings.runtime), overwrite, group)
        result, files = _measure(bench, checkpoints, towards, epochs)
        drawn = _draw(files, output) if group.main else {}
    return {**result, "files": drawn, "rank": group.rank}


def redraw(output: Path) -> dict[str, Any]:
    """Draw every file under `output` again, measuring nothing (`--plot-only`); returns the paths.

    Raises:
        SettingsError: there is nothing to draw.
        StoreError: a file is damaged.
    """
    output = Path(output)
    found = _found(output)
    if not any(found.values()):
        raise SettingsError(f"There is nothing to draw in {output}.", "Run `mbcd landscape` without --plot-only first.")
    return {"checkpoints": {}, "files": _draw(found, output), "rank": 0}


def _measure(
    bench: _Bench,
    checkpoints: Sequence[tuple[str, Any]],
    towards: Sequence[tuple[str, Any]],
    epochs: Sequence[tuple[int, Any]],
) -> tuple[dict[str, Any], dict[str, dict[str, Path]]]:
    """(figures, analysis -> label -> file) of all that is asked for."""
    chosen = bench.settings.landscape
    result: dict[str, Any] = {
        "analyses": list(chosen.analyses),
        "data": {"clips": len(bench.clips), "set": chosen.data, "loss": chosen.loss, "group": chosen.group},
        "checkpoints": {},
        "paths": {},
    }
    files: dict[str, dict[str, Path]] = {name: {} for name in (*ANALYSES, *CONNECTIONS)}
    for number, (label, checkpoint) in enumerate(checkpoints):
        model = bench.model(label, checkpoint, chosen.weights)
        study = bench.study(label, model)
        centre = study.centre()
        figures = {name: ANALYSES[name](study, centre) for name in chosen.analyses}
        result["checkpoints"][label] = {"loss": centre[0], "accuracy": centre[1], **figures}
        for name, summary in figures.items():
            files[name][label] = Path(summary["file"])
        if number == 0 and towards:
            # A path from a checkpoint's student to its own teacher has the same label at both ends.
            named = {o if o != label else f"{o} ({chosen.to_weights})": c for o, c in towards}
            ends = bench.ends(model, {o: bench.model(o, c, chosen.to_weights) for o, c in named.items()})
            for other in named:
                summary = result["paths"][f"{label} to {other}"] = run_path(study, ends, other)
                files["path"][f"{label} to {other}"] = Path(summary["file"])
            result["plane"] = run_plane(study, ends)
            files["plane"][" to ".join([label, *named][:3])] = Path(result["plane"]["file"])
        if number == 0 and epochs:
            models = {f"epoch {e}": bench.model(f"epoch {e}", c, chosen.weights) for e, c in sorted(epochs)}
            result["trajectory"] = run_trajectory(study, bench.ends(model, models))
            files["trajectory"][label] = Path(result["trajectory"]["file"])
    return result, files


def _clips(settings: Settings, dataset: Dataset) -> np.ndarray:
    """The clips to measure on: at most `max_clips`, drawn evenly from the table."""
    chosen = settings.landscape
    if chosen.data == "train":
        clips = dataset.select(domains=source_domains(settings, dataset), splits=("train",))
    else:
        wanted = SOURCE if chosen.data == "validation" else TARGET
        clips = next((s.clips for s in clip_sets(settings, dataset) if s.name == wanted), [])
    if len(clips) == 0:
        raise SettingsError(
            f"landscape.data: there are no {chosen.data} clips.",
            "Choose validation, target or train clips that exist.",
        )
    return _evenly(np.asarray(clips), chosen.max_clips)


def _evenly(clips: np.ndarray, limit: int | None) -> np.ndarray:
    if limit is None or limit >= len(clips):
        return clips
    return clips[np.linspace(0, len(clips) - 1, limit).round().astype(int)]


class _Bench:
    """Builds models, losses and studies for one command; every checkpoint is measured on the same clips."""

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        output: Path,
        device: torch.device,
        overwrite: bool,
        group: Group,
    ) -> None:
        self.group = group
        self.settings, self.dataset, self.output = settings, dataset, output
        self.device, self.overwrite = device, overwrite
        self.clips = _clips(settings, dataset)
        self.calibration = np.zeros(0, dtype=np.int64)
        if settings.landscape.batch_norm == "recalibrated":
            train = dataset.select(domains=source_domains(settings, dataset), splits=("train",))
            self.calibration = _evenly(np.asarray(train), settings.landscape.max_clips)
        if not (self._tested(self.clips) and self._tested(self.calibration)):
            attach_trunks(settings, dataset, device=device)

    def model(self, label: str, checkpoint: Any, wanted: str) -> MultiModalModel:
        """The deployed, student or teacher model of a checkpoint."""
        models = build_models(self.settings, self.dataset, checkpoint, device=self.device, source=label)
        if wanted == "deployed":
            return next(iter(models.values()))
        if wanted not in models:
            raise SettingsError(
                f"landscape.weights: checkpoint {label} has no {wanted}.",
                "It was trained without one; choose deployed or student.",
            )
        return models[wanted]

    def loss(
        self, model: MultiModalModel, *, names: Sequence[str], dtype: torch.dtype = torch.float32
    ) -> ModelObjective:
        """The loss around `model` as a function of `names`."""
        chosen = self.settings.landscape
        return ModelObjective(
            model=model,
            batches=self._batches(self.clips),
            names=names,
            loss=chosen.loss,
            batch_norm=chosen.batch_norm,
            calibration=self._batches(self.calibration),
            device=self.device,
            dtype=dtype,
            points_per_pass=chosen.points_per_pass,
        )

    def _batches(self, clips: np.ndarray) -> Iterable[Any]:
        """Test views; where a cache has none of these clips, the training views that the seed draws."""
        chosen = self.settings.landscape
        if self._tested(clips):
            return self.dataset.batches(clips, batch_size=chosen.batch_size, training=False)
        return self.dataset.batches(clips, batch_size=chosen.batch_size, training=True, seed=chosen.seed)

    def _tested(self, clips: np.ndarray) -> bool:
        return self.dataset.has_test_views(clips)

    def _names(self, model: MultiModalModel) -> tuple[str, ...]:
        return moving_names(model, group=self.settings.landscape.group, loss=self.settings.landscape.loss)

    def study(self, label: str, model: MultiModalModel) -> Study:
        """The analyses of one checkpoint."""
        chosen = self.settings.landscape
        names = self._names(model)
        identity: dict[str, Any] = {
            "weights": _digest(model),
            "clips": _sha(np.ascontiguousarray(self.clips, dtype=np.int64).tobytes()),
            "data": chosen.data if self._tested(self.clips) else f"{chosen.data}, training views of {chosen.seed}",
            "fingerprints": dict(self.dataset.fingerprints),
            "group": chosen.group,
            "loss": chosen.loss,
            "batch_norm": chosen.batch_norm,
        }
        if chosen.batch_norm == "recalibrated":
            identity |= {"calibration_clips": len(self.calibration), "batch_size": chosen.batch_size}
        double = chosen.curvature_dtype == "float64"
        return Study(
            settings=chosen,
            loss=self.loss(model, names=names),
            identity=identity,
            folder=self.output,
            label=label,
            subject=f"{chosen.group} parameters, {chosen.data} clips",
            watch=_watch,
            curvature_loss=(lambda: self.loss(model, names=names, dtype=torch.float64)) if double else None,
            overwrite=self.overwrite,
            group=self.group,
        )

    def ends(self, model: MultiModalModel, others: Mapping[str, MultiModalModel]) -> Ends:
        """Paths from `model` to the others; running statistics move along unless they are recalibrated."""
        names = self._names(model)
        running = self.settings.landscape.batch_norm == "running"
        loss = self.loss(model, names=(*names, *buffers_of(model, names)) if running else names)
        towards = {label: vector_of(m.state_dict(), loss.start, label=label) for label, m in others.items()}
        return Ends(loss, names, towards, {label: _digest(m) for label, m in others.items()})


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


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


def _found(output: Path) -> dict[str, dict[str, Path]]:
    """Every measured file under `output`: analysis -> label -> file."""
    found: dict[str, dict[str, Path]] = {}
    for name in (*ANALYSES, *CONNECTIONS):
        paths = sorted(output.glob(f"{name}-*.h5"))
        read = load_arrays if name == "curvature" else _about
        found[name] = {read(path)[1]["label"]: path for path in paths}
    return found


def _about(path: Path) -> tuple[None, dict[str, Any]]:
    return None, read_grid(path).about


def _draw(have: Mapping[str, Mapping[str, Path]], output: Path) -> dict[str, str]:
    """Every plot whose files are there; name -> path of the files and the plots."""
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
    if have["path"]:
        files["path plot"] = plots.plot_curves(
            have["path"], output / "path.png", title="Loss on the straight path", xlabel="fraction of the way"
        )
    for name, title in (("plane", "Plane through the checkpoints"), ("trajectory", "Trajectory of training")):
        if have[name]:
            files[f"{name} plot"] = plots.plot_surfaces(have[name], output / f"{name}.png", title=title)
    return {name: str(path) for name, path in files.items()}


def show(result: Mapping[str, Any]) -> None:
    """Print what `landscape` returned: tables, then the paths (nothing where another process does)."""
    if result["rank"] != 0:
        return
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
    if result.get("paths"):
        rows = [
            [label, *(f"{p[key]:.4f}" for key in ("from_loss", "to_loss", "barrier")), f"{p['barrier_at']:.2f}"]
            for label, p in result["paths"].items()
        ]
        console.table("Straight paths", ["path", "loss at start", "loss at end", "barrier", "at"], rows)
    for name, path in result["files"].items():
        console.out.print(f"{name}: {path}", markup=False)


def _last(values: list[float] | None, half: list[float] | None = None) -> str:
    if not values:
        return "-"
    return f"{values[-1]:.4f}" + (f" ± {half[-1]:.4f}" if half else "")
