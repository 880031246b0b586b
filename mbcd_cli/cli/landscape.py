"""`mbcd landscape`: flags, one library call, what it returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.evaluate import print_paths
from mbcd_cli.cli.options import Asked, CheckpointPaths, Output, Overwrite, Reply, command
from mbcd_cli.errors import UsageError
from mbcd_cli.json_values import json_values

if TYPE_CHECKING:
    from mbcd_cli.landscape.measure import CheckpointFigures, Surveyed


@command(
    examples=(
        "mbcd landscape --checkpoint RUN/checkpoints/best.pt",
        "mbcd landscape --checkpoint ERM/checkpoints/best.pt --checkpoint MBCD/checkpoints/best.pt",
        "mbcd landscape --checkpoint ERM/checkpoints/best.pt --to MBCD/checkpoints/best.pt",
    ),
)
def landscape(
    asked: Asked,
    checkpoint: CheckpointPaths,
    to: Annotated[
        list[Path] | None,
        typer.Option("--to", help="Checkpoint at the other end of a path; two of them span a plane."),
    ] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Project the run's kept epochs (training.keep_checkpoints) on a plane.")
    ] = False,
    output: Output = None,
    plot_only: Annotated[bool, typer.Option("--plot-only", help="Draw the files again, measure nothing.")] = False,
    overwrite: Overwrite = False,
) -> Reply | None:
    """Show where training ended: loss surfaces, flatness and curvature around checkpoints, paths between them.

    Without --output HDF5 files and plots are written to RUN/landscape.
    """
    if to and len({path.resolve() for path in to}) < len(to):
        raise UsageError("--to names one checkpoint twice.", "Leave one out.")
    from mbcd_cli.landscape import measure
    from mbcd_cli.place import this_process

    if plot_only:
        drawn = measure.redraw(output or measure.default_output(checkpoint[0]))
        return {"files": drawn}, partial(print_paths, drawn)
    done = measure.landscape_requested(
        checkpoint,
        towards=to or (),
        trajectory=trajectory,
        output=output,
        overwrite=overwrite,
        config=asked.config,
        sets=asked.sets,
        flags=asked.flags,
        say=console.terminal,
    )
    if not this_process().main:  # under torchrun the others have measured their share and stay silent
        return None
    return {**json_values(done.figures), "files": done.files}, partial(show_landscape, done)


def show_landscape(done: Surveyed) -> None:
    """Print what `landscape` returned: tables, then the paths."""
    from mbcd_cli.landscape.drawing import with_error

    rows = []
    curvature = []
    for label, figures in done.figures.checkpoints.items():
        if figures.curvature is not None:
            spectrum = figures.curvature
            top = with_error(spectrum.eigenvalues[0], spectrum.errors[0])
            trace = with_error(spectrum.trace, spectrum.trace_error)
            settled = f"{sum(spectrum.converged)} of {len(spectrum.converged)}"
            curvature.append([label, top, trace, settled, spectrum.parameters])
        flat, worst = figures.flatness, figures.worst_case
        rows.append(
            [
                label,
                f"{figures.loss:.4f}",
                f"{100 * figures.accuracy:.1f} %",
                _last(flat.mean_increase, flat.half_width_95) if flat else "-",
                _last(worst.increase) if worst else "-",
                _non_finite(figures),
            ]
        )
    columns = ["checkpoint", "loss", "accuracy", "mean increase", "worst increase", "non-finite points"]
    console.table("Landscape (increases at the largest radius)", columns, rows)
    if curvature:
        columns = ["checkpoint", "top eigenvalue", "trace", "converged", "parameters"]
        console.table("Curvature (Hessian of the loss)", columns, curvature)
    if done.figures.paths:
        rows = [
            [label, *(f"{loss:.4f}" for loss in (path.from_loss, path.to_loss, path.barrier)), f"{path.barrier_at:.2f}"]
            for label, path in done.figures.paths.items()
        ]
        console.table("Straight paths", ["path", "loss at start", "loss at end", "barrier", "at"], rows)
    print_paths(done.files)


def _non_finite(figures: CheckpointFigures) -> int:
    """Points of all analyses of a checkpoint whose loss is not finite."""
    return sum(getattr(getattr(figures, analysis.name), "non_finite", 0) for analysis in fields(figures))


def _last(values: Sequence[float], half: Sequence[float] = ()) -> str:
    if not values:
        return "-"
    return f"{values[-1]:.4f}" + (f" ± {half[-1]:.4f}" if half else "")
