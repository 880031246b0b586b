"""`mbcd evaluate`: flags, one library call, what it returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import (
    Asked,
    CheckpointPath,
    MoreRuns,
    Output,
    Reply,
    RunPath,
    RunPatterns,
    command,
    listed,
    with_more,
)
from mbcd_cli.errors import UsageError
from mbcd_cli.json_values import json_values

if TYPE_CHECKING:
    from mbcd_cli.evaluation.evaluate import Evaluation
    from mbcd_cli.evaluation.new_data import Predicted
    from mbcd_cli.evaluation.report.comparison import Comparison
    from mbcd_cli.evaluation.report.tables import Table

_NEW = "New clips"
_MANIFEST, _MAX_BAD = "dataset.reader.manifest", "dataset.max_bad"


@command(
    *("evaluation.analyses", "evaluation.export", "cache.weights_dir", _MANIFEST, _MAX_BAD),
    panels={_MANIFEST: _NEW, _MAX_BAD: _NEW},
    examples=(
        "mbcd evaluate --run runs/av-digits/mbcd-va-street-s0",
        "mbcd evaluate --run RUN --analyses all --export csv,hdf5",
        "mbcd evaluate --run RUN --data-root new-clips",
        "mbcd evaluate --runs 'runs/av-digits/*' --output comparison",
    ),
)
def evaluate(
    asked: Asked,
    run: RunPath = None,
    checkpoint: CheckpointPath = None,
    runs: RunPatterns = None,
    more: MoreRuns = None,
    ood: Annotated[
        Path | None,
        typer.Option("--ood", help="Cache folder of another dataset, for out-of-distribution detection."),
    ] = None,
    output: Output = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder of new clips to predict.", rich_help_panel=_NEW)
    ] = None,
) -> Reply:
    """Measure a run on its domains, predict new clips with it, or compare runs.

    Accuracy fused and per modality, missing modalities, calibration, t-SNE, an HTML report.

    With --data-root, new clips (labelled or not) are prepared and predicted: predict.csv.

    Without --output it is written to RUN, CHECKPOINT-evaluation, comparison or predict-NAME.
    """
    runs = with_more(runs, more)
    flags: dict[str, object] = {
        path: listed(path, text) if path.startswith("evaluation.") else text for path, text in asked.flags.items()
    }
    manifest, max_bad = flags.pop(_MANIFEST, None), flags.pop(_MAX_BAD, None)
    if sum(given is not None for given in (run, checkpoint, runs)) != 1:
        raise UsageError("Name what to evaluate.", "Use one of --run RUN, --checkpoint FILE and --runs PATTERN.")
    new = data_root is not None or manifest is not None
    if new and (runs is not None or ood is not None):
        raise UsageError(
            "New clips are predicted by one model alone.",
            "Leave out --runs and --ood with --data-root or --manifest.",
        )
    if not new and max_bad is not None:
        raise UsageError("--max-bad is about new clips.", "Name their folder with --data-root.")
    from mbcd_cli.evaluation.requested import evaluate_requested

    done = evaluate_requested(
        run=run,
        checkpoint=checkpoint,
        runs=runs,
        ood=ood,
        output=output,
        data_root=data_root,
        manifest=manifest,
        max_bad=max_bad or "0",
        config=asked.config,
        sets=asked.sets,
        flags=flags,
        say=console.terminal,
    )
    if runs is not None:
        return done, partial(show_comparison, done)
    if new:
        return done, partial(show_predicted, done)
    return {**json_values(done.results), "files": done.files}, partial(show_evaluation, done)


def show_evaluation(done: Evaluation) -> None:
    """Print what `evaluate` returned: tables and paths on stdout, warnings on stderr."""
    from mbcd_cli.evaluation.report.sections import summary_tables

    files = done.files
    print_tables(summary_tables(done.results), done.results.warnings)
    print_paths({name: files[name] for name in ("report", "results") if name in files})
    others = [path for name, path in files.items() if name not in ("report", "results")]
    for folder in dict.fromkeys(path.parent for path in others):
        count = sum(path.parent == folder for path in files.values())
        console.show(f"{folder.name}: {folder} ({count} files)")


def show_comparison(done: Comparison) -> None:
    """Print what `compare_runs` returned."""
    fitting = [table.fitting(console.out.width) for table in done.tables]
    print_tables([replace(table, rows=table.shown()) for table in fitting], done.warnings)
    print_paths({name: path for name, path in done.files.items() if not name.endswith((".csv", ".tex", ".png"))})


def print_tables(tables: Sequence[Table], warnings: Sequence[str]) -> None:
    """Print tables with their notes, and warnings (on stderr)."""
    from mbcd_cli.evaluation.report.tables import plain

    for table in tables:
        console.table(table.title, table.columns, [[plain(cell) for cell in row] for row in table.rows])
        if table.note:
            console.show(table.note)
    for warning in warnings:
        console.warn(warning)


def print_paths(files: Mapping[str, Path]) -> None:
    """Print name and path of what was written."""
    for name, path in files.items():
        console.show(f"{name}: {path}")


def show_predicted(done: Predicted) -> None:
    """Print what `predict_new` returned."""
    console.table(
        f"{done.predicted} of {done.clips} clips predicted by the {done.model} of checkpoint {done.checkpoint}",
        ("class", "clips"),
        [(name or "(no prediction)", count) for name, count in done.classes.items()],
    )
    if done.accuracy is not None:
        console.table(
            f"Accuracy on the {done.labelled} labelled clips (%)",
            ("head", "top-1", "mean class"),
            [
                (head, f"{100 * figures.top1:.1f}", f"{100 * figures.mean_class_accuracy:.1f}")
                for head, figures in done.accuracy.items()
            ],
        )
    print_paths(done.files)
    if done.exit_code:
        bad = len({bad.clip for bad in done.rejected})
        console.say(
            f"error: {bad} clips were rejected, and --max-bad allows {done.max_bad}; the others are predicted.\n"
            f"Mend the files in the table above, or run again with --max-bad {bad}."
        )
