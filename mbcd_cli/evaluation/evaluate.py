"""`mbcd evaluate`: measure a run's checkpoints on a prepared dataset, write results.json, plots and a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mbcd_cli.checksums import of_file
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.evaluation.analyses.analyse import Analysis, analyse, earlier
from mbcd_cli.evaluation.analyses.robustness import subset_variants
from mbcd_cli.evaluation.evaluator import evaluate_models
from mbcd_cli.evaluation.report import plots
from mbcd_cli.evaluation.report.export import write_outcomes
from mbcd_cli.evaluation.report.html import write_report
from mbcd_cli.evaluation.report.results import Results, results_of
from mbcd_cli.files import give_place, write_json
from mbcd_cli.json_values import json_values
from mbcd_cli.locks import folder_aside
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.runs.folder import epoch_records
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import TARGET
from mbcd_cli.scoring.deployed import deployed
from mbcd_cli.scoring.history import accuracy_history
from mbcd_cli.settings import EvaluationSettings, Settings
from mbcd_cli.settings.sources import to_toml


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found, and name -> path of everything it wrote."""

    results: Results
    files: dict[str, Path]


def for_tables(asked: EvaluationSettings) -> EvaluationSettings:
    """What of an evaluation tables need: no report, and nothing that is only drawn."""
    analyses = tuple(name for name in asked.analyses if name != "insight")
    return asked.model_copy(update={"analyses": analyses, "report": False})


def evaluate(
    settings: Settings,
    dataset: Dataset,
    checkpoints: Mapping[str, Checkpoint],
    *,
    device: torch.device,
    run: Path | None,
    output: Path,
    ood: Dataset | None = None,
    landscape: Path | None = None,
    pictures: bool = True,
    say: Say = SILENT,
) -> Evaluation:
    """Evaluate `checkpoints` (best / last -> checkpoint) and write everything under `output`.

    Args:
        settings: the run's, with the evaluation slice to use now.
        dataset: prepared, matching `settings`.
        checkpoints: those of `settings.evaluation.checkpoints` that exist.
        device: where to compute.
        run: the run folder, for its accuracy per epoch; None takes what the checkpoint remembers.
        output: folder for results.json, report.html, plots/ and evaluation/ (usually the run folder).
        ood: another prepared dataset, for out-of-distribution detection.
        landscape: folder of landscape plots that the report shows; by default the run's.
        pictures: draw plots.

    Raises:
        SettingsError, MbcdError: domains without clips.
        CheckpointError: weights of another model, or one that cannot read `ood`.
        FileError: `output` cannot be written.
    """
    with folder_aside(output / "evaluation") as aside:  # before the work: it tells whether there is a place
        evaluated, model = evaluate_models(
            settings,
            dataset,
            checkpoints,
            device=device,
            say=say,
            variants=subset_variants if "missing" in settings.evaluation.analyses else lambda model: {},
        )
        chosen = deployed(checkpoints)
        results = results_of(settings, dataset, checkpoints, evaluated, deployed=chosen, device=device)
        results.checkpoints = checkpoint_checksums(run, checkpoints)
        of_chosen = [on_set for on_set in evaluated if (on_set.checkpoint, on_set.model) == chosen]
        analysis = Analysis(
            settings=settings,
            dataset=dataset,
            model=model,
            evaluated=sorted(of_chosen, key=lambda on_set: on_set.clip_set.name != TARGET),
            results=results,
            device=device,
            output=aside,
            say=say,
            pictures=pictures,
        )
        analysis.files["outcomes"] = write_outcomes(analysis.main.predictions, dataset, aside)
        _accuracy_plots(analysis)
        _history(analysis, run, checkpoints[chosen[0]])
        analyse(analysis, ood=ood)
        files = dict(analysis.files)
        if settings.evaluation.report:
            shown = {"files": analysis.files, "run": run, "landscape": landscape, "skip": earlier(output)}
            files["report"] = write_report(aside / "report.html", results, settings=to_toml(settings), **shown)
        written = {name: path.relative_to(aside) for name, path in files.items() if path.is_relative_to(aside)}
        sums = {path.as_posix(): of_file(aside / path) for path in written.values()}
        sums |= {p.relative_to(output).as_posix(): of_file(p) for p in _beside(files, aside, output)}
        write_json(aside / "results.json", {**json_values(results), "files": sums})
        give_place(aside, output, [*written.values(), "results.json"], earlier=earlier(output))
    files |= {name: output / path for name, path in written.items()} | {"results": output / "results.json"}
    return Evaluation(results, files)


def _beside(files: Mapping[str, Path], aside: Path, output: Path) -> list[Path]:
    """Files that the training has left under `output`, and the evaluation speaks of."""
    return [p for p in files.values() if p.is_relative_to(output) and not p.is_relative_to(aside)]


def checkpoint_checksums(run: Path | None, checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """The checksum of every checkpoint's file, so that readers of the results can tell whether it is still there.

    As it was when it was read: a training that goes on writes others.
    """
    return {} if run is None else {name: checkpoint.checksum for name, checkpoint in checkpoints.items()}


def _accuracy_plots(analysis: Analysis) -> None:
    names = list(analysis.dataset.label_names)
    for on_set in analysis.evaluated:
        key, where = on_set.clip_set.name, analysis.name(on_set)
        fused = on_set.figures["fused"]
        analysis.draw(
            f"confusion on {key}",
            plots.plot_confusion,
            fused.confusion,
            names,
            analysis.plot(f"confusion-{key}.png"),
            title=f"{where}: {100 * fused.top1:.1f} % right",
        )
        analysis.draw(
            f"classes on {key}",
            plots.plot_per_class,
            {head: [c.accuracy for c in figures.per_class.values()] for head, figures in on_set.figures.items()},
            names,
            analysis.plot(f"classes-{key}.png"),
            title=f"Accuracy per class on {where}",
        )


def _history(analysis: Analysis, run: Path | None, checkpoint: Checkpoint) -> None:
    records = epoch_records(run) if run is not None else []
    history = accuracy_history(records or checkpoint.history)
    if history is None:
        return
    analysis.results.oracle = history.oracle(analysis.results.headline.model)
    if run is not None and (drawn := run / "plots" / "accuracy.png").is_file():  # by the training
        analysis.files["accuracy per epoch"] = drawn
