"""`mbcd landscape`: measure the loss around checkpoints, keep it in HDF5 files, draw it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mbcd_cli import checksums
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import FOREIGN, CheckpointError, SettingsError
from mbcd_cli.files import remove, write_json
from mbcd_cli.json_values import OPTIONAL, json_values
from mbcd_cli.landscape import analyses, drawing
from mbcd_cli.landscape.analyses import FlatnessFigures, GridFigures, Measured, Study, WorstCaseFigures
from mbcd_cli.landscape.bench import Bench
from mbcd_cli.landscape.connections import PathFigures, TrajectoryFigures, run_path, run_plane, run_trajectory
from mbcd_cli.landscape.curvature import CurvatureFigures, run_curvature
from mbcd_cli.landscape.store import StoreError, load_arrays, read_grid
from mbcd_cli.processes import joined
from mbcd_cli.runs import opening
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.runs.names import REPEATED, label_checkpoints, run_of
from mbcd_cli.runtime import configure, float32_products, pick_device
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
"""File of the figures, and of the checksums of what the command measured and drew."""
CONNECTIONS = ("path", "plane", "trajectory")


@dataclass(frozen=True, slots=True)
class CheckpointFigures:
    """Loss and accuracy (0 to 1) at a checkpoint, and the figures of every analysis that was asked for."""

    loss: float
    accuracy: float
    surface: GridFigures | None = field(default=None, metadata=OPTIONAL)
    curve: GridFigures | None = field(default=None, metadata=OPTIONAL)
    flatness: FlatnessFigures | None = field(default=None, metadata=OPTIONAL)
    worst_case: WorstCaseFigures | None = field(default=None, metadata=OPTIONAL)
    curvature: CurvatureFigures | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class MeasuredOn:
    """How many clips of which set, which loss, and the group of parameters that moves."""

    clips: int
    set: str
    loss: str
    group: str


@dataclass(slots=True, kw_only=True)
class Landscape:
    """What landscape.json holds: per checkpoint, per path, of the plane and of the trajectory, by their labels."""

    analyses: list[str]
    data: MeasuredOn
    checkpoints: dict[str, CheckpointFigures] = field(default_factory=dict)
    paths: dict[str, PathFigures] = field(default_factory=dict)
    plane: GridFigures | None = field(default=None, metadata=OPTIONAL)
    trajectory: TrajectoryFigures | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What `landscape` found, and name -> path of everything written; under torchrun the latter in rank 0 only."""

    figures: Landscape
    files: dict[str, Path]


@float32_products()
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
) -> Surveyed:
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
        figures, measured = _measure(bench, checkpoints, towards, epochs)
        files = _draw(measured, output) if group.main else {}
        if group.main:
            sums = {path.name: checksums.of_file(path) for path in files.values()}  # others may be at work here
            files["summary"] = write_json(output / SUMMARY, {**json_values(figures), "files": sums})
    return Surveyed(figures, files)


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


def redraw(output: Path) -> dict[str, Path]:
    """Draw every file under `output` again, measuring nothing (`--plot-only`); name -> path of files and plots.

    Raises:
        SettingsError: there is nothing to draw.
        StoreError: a file is damaged.
    """
    output = Path(output)
    try:
        measured = _measured(output)
        drawn = _draw(measured, output) if any(measured.values()) else None
    except FOREIGN as error:
        raise StoreError(
            f"{output}: its files cannot be drawn ({type(error).__name__}: {error}).", "Remove them and measure anew."
        ) from error
    if drawn is None:
        raise SettingsError(f"There is nothing to draw in {output}.", "Run `mbcd landscape` without --plot-only first.")
    return drawn


def _measure(
    bench: Bench,
    checkpoints: Sequence[tuple[str, Checkpoint]],
    towards: Sequence[tuple[str, Checkpoint]],
    epochs: Sequence[tuple[int, Checkpoint]],
) -> tuple[Landscape, dict[str, dict[str, Path]]]:
    """(figures, analysis -> label -> file) of all that is asked for."""
    chosen = bench.settings.landscape
    data = MeasuredOn(len(bench.clips), chosen.data, chosen.loss, chosen.group)
    landscape = Landscape(analyses=list(chosen.analyses), data=data)
    files: dict[str, dict[str, Path]] = {name: {} for name in (*ANALYSES, *CONNECTIONS)}
    for number, (label, checkpoint) in enumerate(checkpoints):
        model = bench.model(label, checkpoint, chosen.weights)
        study = bench.study(label, model)
        centre = study.centre()
        analysed = {name: ANALYSES[name](study, centre) for name in chosen.analyses}
        landscape.checkpoints[label] = CheckpointFigures(*centre, **analysed)
        for name, figures in analysed.items():
            files[name][label] = Path(figures.file)
        if number == 0 and towards:
            named, start = dict(towards), label
            if chosen.weights != chosen.to_weights:  # a student and its own teacher, say: one checkpoint at both ends
                named = {f"{o.rstrip(REPEATED)} ({chosen.to_weights})": c for o, c in towards}
                start = f"{label} ({chosen.weights})"
            ends = bench.ends(model, {o: bench.model(o, c, chosen.to_weights) for o, c in named.items()})
            for other in named:
                path = landscape.paths[f"{start} to {other}"] = run_path(study, ends, other)
                files["path"][f"{start} to {other}"] = Path(path.file)
            landscape.plane = run_plane(study, ends)
            files["plane"][" to ".join([start, *named][:3])] = Path(landscape.plane.file)
        if number == 0 and epochs:
            models = {f"epoch {e}": bench.model(f"epoch {e}", c, chosen.weights) for e, c in sorted(epochs)}
            landscape.trajectory = run_trajectory(study, bench.ends(model, models))
            files["trajectory"][label] = Path(landscape.trajectory.file)
    return landscape, files


def _measured(output: Path) -> dict[str, dict[str, Path]]:
    """Every measured file under `output`: analysis -> label -> file."""
    files: dict[str, dict[str, Path]] = {}
    for name in (*ANALYSES, *CONNECTIONS):
        paths = sorted(output.glob(f"{name}-*.h5"))
        files[name] = {_label(path, of_arrays=name == "curvature"): path for path in paths}
    return files


def _label(path: Path, *, of_arrays: bool) -> str:
    return str((load_arrays(path)[1] if of_arrays else read_grid(path).about)["label"])


def _draw(have: Mapping[str, Mapping[str, Path]], output: Path) -> dict[str, Path]:
    """Every plot whose files are there; name -> path of the files and the plots."""
    files = {f"{name} of {label}": path for name, by_label in have.items() for label, path in by_label.items()}
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
    return files


def landscape_requested(
    checkpoints: Sequence[Path],
    *,
    towards: Sequence[Path] = (),
    trajectory: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object],
    say: Say = SILENT,
) -> Surveyed:
    """`landscape` of checkpoints' files, on the dataset that they were trained on.

    Args:
        checkpoints: one or more. towards: at the other ends of paths from the first, one or two.
        trajectory: the epochs that the first one's training kept too.
        output: None: `default_output`.
        overwrite: measure anew instead of resuming.
        config, sets, flags: settings over those of the training, as `opening.load_checkpoints` takes them.
        say: told how far it is.

    Raises:
        MbcdError: what is named is not there, or does not fit.
    """
    labelled = label_checkpoints([*checkpoints, *towards])
    settings, dataset, opened = opening.open_checkpoints(labelled, config=config, sets=sets, flags=flags)
    pairs = list(opened.items())
    return landscape(
        settings,
        dataset,
        pairs[: len(checkpoints)],
        towards=pairs[len(checkpoints) :],
        epochs=opening.kept_epochs(checkpoints[0]) if trajectory else (),
        output=output or default_output(checkpoints[0]),
        device=configure(settings.runtime),
        overwrite=overwrite,
        say=say,
    )


def default_output(checkpoint: Path) -> Path:
    """`RUN/landscape` of the checkpoint's run, or `landscape` beside a checkpoint that lies in none."""
    return (run_of(checkpoint) or checkpoint.parent) / "landscape"
