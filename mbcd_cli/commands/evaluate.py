"""`mbcd evaluate`: measure a run's checkpoints on a prepared dataset, write results.json and plots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mbcd_cli import console
from mbcd_cli.data.records import Batch
from mbcd_cli.evaluation import plots
from mbcd_cli.evaluation.evaluator import Evaluated, deployed, evaluate_models
from mbcd_cli.evaluation.history import accuracy_history
from mbcd_cli.evaluation.report import clips_name, print_results
from mbcd_cli.evaluation.results import collect, describe, read_records, warnings, write_json
from mbcd_cli.settings import Settings


def evaluate(
    settings: Settings,
    dataset: Any,
    checkpoints: Mapping[str, Any],
    *,
    device: torch.device,
    run: Path | None,
    output: Path,
) -> dict[str, Any]:
    """Evaluate `checkpoints` (best / last -> checkpoint) and write everything under `output`.

    Args:
        settings: the run's, with the evaluation slice to use now.
        dataset: prepared, matching `settings`.
        checkpoints: those of `settings.evaluation.checkpoints` that exist.
        device: where to compute.
        run: the run folder, for its accuracy per epoch; None evaluates lone checkpoint files.
        output: folder for results.json and plots/ (usually the run folder).

    Returns:
        What results.json holds, and `files`: name -> path of everything written.
    """
    results = evaluate_models(settings, dataset, checkpoints, device=device, watch=_watch)
    about = describe(settings, dataset, checkpoints)
    figures = collect(about, results, deployed(checkpoints))
    figures["warnings"] = warnings(figures, checkpoints)
    files = _plots(figures, results, run, output / "plots")
    files = {"results": write_json(figures, output / "results.json"), **files}
    return {**figures, "files": {name: str(path) for name, path in files.items()}}


def show(figures: Mapping[str, Any]) -> None:
    """Print what `evaluate` returned: tables and paths on stdout, warnings on stderr."""
    print_results(figures, {name: Path(path) for name, path in figures["files"].items()})


def _watch(batches: Iterable[Batch]) -> Iterator[Batch]:
    with console.progress("evaluating batches") as ticker:
        for batch in batches:
            yield batch
            ticker.advance()


def _plots(figures: Mapping[str, Any], results: list[Evaluated], run: Path | None, folder: Path) -> dict[str, Path]:
    headline, names = figures["headline"], figures["label_names"]
    files = {}
    for one in results:
        if (one.checkpoint, one.model) != (headline["checkpoint"], headline["model"]):
            continue
        where = clips_name(figures, one.clip_set.name)
        top1 = 100 * one.figures["fused"]["top1"]
        files[f"confusion on {one.clip_set.name}"] = plots.plot_confusion(
            one.figures["fused"]["confusion"],
            names,
            folder / f"confusion-{one.clip_set.name}.png",
            title=f"{where}: {top1:.1f} % right",
        )
        files[f"classes on {one.clip_set.name}"] = plots.plot_per_class(
            {h: [c["accuracy"] for c in f["per_class"].values()] for h, f in one.figures.items()},
            names,
            folder / f"classes-{one.clip_set.name}.png",
            title=f"Accuracy per class on {where}",
        )
    history = accuracy_history(read_records(run / "metrics.jsonl")) if run is not None else None
    if history:
        best = figures["epochs"].get("best")
        files["accuracy per epoch"] = plots.plot_lines(
            history.epochs,
            {f"{model}, {where}": line for (where, model), line in history.lines.items()},
            folder / "accuracy-per-epoch.png",
            title="Accuracy per epoch",
            xlabel="epoch",
            ylabel="accuracy",
            marks={best: "best"} if best is not None else None,
            whole=True,
        )
    return files
