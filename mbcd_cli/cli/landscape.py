"""`mbcd landscape`: flags, one library call, what it returned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command
from mbcd_cli.errors import UsageError


@command(
    examples=(
        "mbcd landscape --checkpoint RUN/checkpoints/best.pt",
        "mbcd landscape --checkpoint ERM/checkpoints/best.pt --checkpoint MBCD/checkpoints/best.pt",
        "mbcd landscape --checkpoint ERM/checkpoints/best.pt --to MBCD/checkpoints/best.pt",
    ),
)
def landscape(
    asked: Asked,
    checkpoint: Annotated[
        list[Path], typer.Option("--checkpoint", help="Checkpoint file; repeat it to compare several.")
    ],
    to: Annotated[
        list[Path] | None,
        typer.Option("--to", help="Checkpoint at the other end of a path; two of them span a plane."),
    ] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Project the run's kept epochs (training.keep_checkpoints) on a plane.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for HDF5 files and plots (default: RUN/landscape).")
    ] = None,
    plot_only: Annotated[bool, typer.Option("--plot-only", help="Draw the files again, measure nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure anew instead of resuming.")] = False,
) -> Reply | None:
    """Show where training ended: loss surfaces, flatness and curvature around checkpoints, paths between them."""
    from mbcd_cli.landscape import measure
    from mbcd_cli.runs import names, opening
    from mbcd_cli.runtime import configure

    folder = output or (names.run_of(checkpoint[0]) or checkpoint[0].parent) / "landscape"
    if plot_only:
        drawn = measure.redraw(folder)
        return drawn, partial(show_landscape, drawn)
    if to and len({path.resolve() for path in to}) < len(to):
        raise UsageError("--to names one checkpoint twice.", "Leave one out.")
    labelled = names.label_checkpoints([*checkpoint, *(to or [])])
    settings, data, checkpoints = opening.open_checkpoints(
        labelled, config=asked.config, sets=asked.sets, flags=asked.flags
    )
    pairs = list(checkpoints.items())
    result = measure.landscape(
        settings,
        data,
        pairs[: len(checkpoint)],
        towards=pairs[len(checkpoint) :],
        epochs=opening.kept_epochs(checkpoint[0]) if trajectory else (),
        output=folder,
        device=configure(settings.runtime),
        overwrite=overwrite,
        say=console.terminal,
    )
    # Under torchrun the others have measured their share and stay silent.
    return (result, partial(show_landscape, result)) if result.get("rank", 0) == 0 else None


def show_landscape(result: Mapping[str, Any]) -> None:
    """Print what `landscape` returned: tables, then the paths (nothing where another process does)."""
    if result["rank"] != 0:
        return
    from mbcd_cli.landscape.drawing import with_error

    rows = []
    curvature = []
    for label, figures in result["checkpoints"].items():
        if "curvature" in figures:
            found = figures["curvature"]
            top = with_error(found["eigenvalues"][0], found["errors"][0])
            trace = with_error(found["trace"], found["trace_error"])
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
