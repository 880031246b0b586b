"""`mbcd landscape`: measure the loss around checkpoints, keep it in HDF5 files, draw it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mbcd_cli import checksums
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import FOREIGN, CheckpointError, SettingsError
from mbcd_cli.files import remove, write_json
from mbcd_cli.landscape import analyses, drawing
from mbcd_cli.landscape.analyses import Measured, Study
from mbcd_cli.landscape.bench import Bench
from mbcd_cli.landscape.connections import run_path, run_plane, run_trajectory
from mbcd_cli.landscape.curvature import run_curvature
from mbcd_cli.landscape.store import StoreError, load_arrays, read_grid
from mbcd_cli.processes import joined
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.runs.names import REPEATED
from mbcd_cli.runtime import pick_device
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings

ANALYSES: dict[str, Callable[[Study, tuple[float, float]], Measured]] = {
    "surface": analyses.run_surface,
    "curve": analyses.run_curve,
    "flatness": analyses.run_flatness,
    "worst_case": analyses.run_worst_case,
    "curvature": run_curvature,
}
SUMMARY = "landscape.json"
"""File of the figures, and of the checksums of everything measured and drawn."""
CONNECTIONS = ("path", "plane", "trajectory")


def landscape(
    settings: Settings,
    dataset: Dataset,
    checkpoints: Sequence[tuple[str, Checkpoint]],
    *,
    output: Path,
    towards: Sequence[tuple[str, Checkpoint]] = (),
    epochs: Sequence[tuple[int, Checkpoint]] = (),
    device: torch.device | None = None,
    overwrite: bool = False,
    say: Say = SILENT,
) -> dict[str, Any]:
    """Measure the landscape around every checkpoint and write files and plots under `output`.

    Args:
        settings: the run's, with the landscape slice to use now.
        dataset: prepared, matching `settings`.
        checkpoints: (label, checkpoint) pairs; labels are distinct.
        output: folder of the HDF5 files, plots and `landscape.json`.
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
    with joined(torch.device("cpu"), say=say, patience=86400.0) as group:
        bench = Bench(settings, dataset, output, device or pick_device(settings.runtime), overwrite, group, say)
        if group.main:
            remove(output / SUMMARY)  # it would speak of what is measured anew
        _warn_of_others(settings, [*checkpoints, *towards], say)
        result, files = _measure(bench, checkpoints, towards, epochs)
        drawn = _draw(files, output) if group.main else {}
        if group.main:
            sums = checksums.of_files(output, but=(SUMMARY,))
            finite = json.loads(json.dumps(result), parse_constant=lambda name: None)
            drawn["summary"] = str(write_json(output / SUMMARY, {**finite, "files": sums}))
    return {**result, "files": drawn, "rank": group.rank}


def _warn_of_others(settings: Settings, checkpoints: Sequence[tuple[str, Checkpoint]], say: Say) -> None:
    """Warn of checkpoints whose unseen domain is another: all are measured on the clips of one.

    Raises:
        CheckpointError: one was trained on another dataset.
    """
    wanted = settings.dataset.name, settings.training.target_domain
    for label, checkpoint in checkpoints:
        dataset, target = checkpoint.settings.dataset.name, checkpoint.settings.training.target_domain
        if dataset != wanted[0]:
            raise CheckpointError(
                f"Checkpoint {label} was trained on dataset {dataset}, and the clips are those of {wanted[0]}.",
                "Measure it by a command of its own.",
            )
        if target != wanted[1]:
            say.warn(
                f"Checkpoint {label} was trained for target {target}, and all are measured on the clips chosen for "
                f"target {wanted[1]}: its own unseen domain may be among them."
            )


def redraw(output: Path) -> dict[str, Any]:
    """Draw every file under `output` again, measuring nothing (`--plot-only`); returns the paths.

    Raises:
        SettingsError: there is nothing to draw.
        StoreError: a file is damaged.
    """
    output = Path(output)
    try:
        found = _found(output)
        drawn = _draw(found, output) if any(found.values()) else None
    except FOREIGN as error:
        raise StoreError(
            f"{output}: its files cannot be drawn ({type(error).__name__}: {error}).", "Remove them and measure anew."
        ) from error
    if drawn is None:
        raise SettingsError(f"There is nothing to draw in {output}.", "Run `mbcd landscape` without --plot-only first.")
    return {"checkpoints": {}, "files": drawn, "rank": 0}


def _measure(
    bench: Bench,
    checkpoints: Sequence[tuple[str, Checkpoint]],
    towards: Sequence[tuple[str, Checkpoint]],
    epochs: Sequence[tuple[int, Checkpoint]],
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
        of_checkpoint: dict[str, Any] = {"loss": centre[0], "accuracy": centre[1]}
        for name in chosen.analyses:
            figures = ANALYSES[name](study, centre)
            of_checkpoint[name] = asdict(figures)
            files[name][label] = Path(figures.file)
        result["checkpoints"][label] = of_checkpoint
        if number == 0 and towards:
            named, start = dict(towards), label
            if chosen.weights != chosen.to_weights:  # a student and its own teacher, say: one checkpoint at both ends
                named = {f"{o.rstrip(REPEATED)} ({chosen.to_weights})": c for o, c in towards}
                start = f"{label} ({chosen.weights})"
            ends = bench.ends(model, {o: bench.model(o, c, chosen.to_weights) for o, c in named.items()})
            for other in named:
                path = run_path(study, ends, other)
                result["paths"][f"{start} to {other}"] = asdict(path)
                files["path"][f"{start} to {other}"] = Path(path.file)
            plane = run_plane(study, ends)
            result["plane"] = asdict(plane)
            files["plane"][" to ".join([start, *named][:3])] = Path(plane.file)
        if number == 0 and epochs:
            models = {f"epoch {e}": bench.model(f"epoch {e}", c, chosen.weights) for e, c in sorted(epochs)}
            trajectory = run_trajectory(study, bench.ends(model, models))
            result["trajectory"] = asdict(trajectory)
            files["trajectory"][label] = Path(trajectory.file)
    return result, files


def _found(output: Path) -> dict[str, dict[str, Path]]:
    """Every measured file under `output`: analysis -> label -> file."""
    found: dict[str, dict[str, Path]] = {}
    for name in (*ANALYSES, *CONNECTIONS):
        paths = sorted(output.glob(f"{name}-*.h5"))
        read = load_arrays if name == "curvature" else _about
        found[name] = {read(path)[1]["label"]: path for path in paths}
    return found


def _about(path: Path) -> tuple[None, dict[str, object]]:
    return None, read_grid(path).about


def _draw(have: Mapping[str, Mapping[str, Path]], output: Path) -> dict[str, str]:
    """Every plot whose files are there; name -> path of the files and the plots."""
    files = {f"{name} of {label}": path for name, found in have.items() for label, path in found.items()}
    if have["surface"]:
        files["surface plot"] = drawing.plot_surfaces(have["surface"], output / "surface.png")
        files["surface plot in 3-D"] = drawing.plot_surfaces_3d(have["surface"], output / "surface-3d.png")
    if have["curve"]:
        files["curve plot"] = drawing.plot_curves(have["curve"], output / "curve.png")
    if have["flatness"] or have["worst_case"]:
        files["flatness plot"] = drawing.plot_flatness(
            have["flatness"], output / "flatness.png", worst=have["worst_case"]
        )
    if have["curvature"]:
        files["spectrum plot"] = drawing.plot_spectra(have["curvature"], output / "spectrum.png")
    if have["path"]:
        files["path plot"] = drawing.plot_curves(
            have["path"], output / "path.png", title="Loss on the straight path", xlabel="fraction of the way"
        )
    for name, title in (("plane", "Plane through the checkpoints"), ("trajectory", "Trajectory of training")):
        if have[name]:
            files[f"{name} plot"] = drawing.plot_surfaces(have[name], output / f"{name}.png", title=title)
    return {name: str(path) for name, path in files.items()}
