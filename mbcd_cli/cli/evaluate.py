"""`mbcd evaluate`: flags, one library call, what it returned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command, listed
from mbcd_cli.errors import UsageError

_NEW = "New clips"


@command(
    *[
        "evaluation.analyses",
        "evaluation.export",
        "cache.weights_dir",
    ],
    examples=(
        "mbcd evaluate --run runs/av-digits/mbcd-va-street-s0",
        "mbcd evaluate --run RUN --analyses all --export csv,hdf5",
        "mbcd evaluate --run RUN --data-root new-clips",
        "mbcd evaluate --runs 'runs/av-digits/*' --output comparison",
    ),
)
def evaluate(
    asked: Asked,
    run: Annotated[Path | None, typer.Option("--run", help="Run folder; its best and last checkpoints.")] = None,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="One checkpoint file.")] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option("--runs", help="Evaluated run folders (a pattern; repeatable) to compare in tables."),
    ] = None,
    ood: Annotated[
        Path | None,
        typer.Option("--ood", help="Cache folder of another dataset, for out-of-distribution detection."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for what is written (default: RUN, or CHECKPOINT-evaluation)."),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder of new clips to predict.", rich_help_panel=_NEW)
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            help="CSV table of the new clips (default: manifest.csv in their folder).",
            rich_help_panel=_NEW,
        ),
    ] = None,
    max_bad: Annotated[
        str | None,
        typer.Option(
            "--max-bad", help="Rejected new clips tolerated: a number, or a share (5%).", rich_help_panel=_NEW
        ),
    ] = None,
) -> Reply:
    """Measure a run on its domains, predict new clips with it, or compare runs.

    Accuracy fused and per modality, missing modalities, calibration, t-SNE, an HTML report.

    With --data-root, new clips (labelled or not) are prepared and predicted: predict.csv.
    """
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
    from mbcd_cli.runs import opening
    from mbcd_cli.runs.names import run_checkpoints, run_of
    from mbcd_cli.runtime import configure

    if runs is not None:
        from mbcd_cli.evaluation.report.comparison import compare_runs

        compared = compare_runs(runs, output=output or Path("comparison"))
        return compared, partial(show_comparison, compared)
    files = run_checkpoints(run) if run is not None else {checkpoint.stem: checkpoint}
    flags = {path: listed(path, text) if path.startswith("evaluation.") else text for path, text in asked.flags.items()}
    layers = {"config": asked.config, "sets": asked.sets, "flags": flags}
    if new:
        from mbcd_cli.evaluation.new_data import predict_new

        settings, checkpoints = opening.load_checkpoints(files, **layers)
        predicted = predict_new(
            settings,
            checkpoints,
            root=data_root,
            manifest=manifest,
            cache_dir=flags.get("cache.dir"),
            output=output,
            device=configure(settings.runtime),
            max_bad=max_bad or "0",
            say=console.terminal,
        )
        return predicted, partial(show_predicted, predicted)
    from mbcd_cli.evaluation.evaluate import evaluate

    settings, data, checkpoints = opening.open_checkpoints(files, **layers)
    if run is not None:
        checkpoints = {name: checkpoints[name] for name in settings.evaluation.checkpoints if name in checkpoints}
    folder = run or run_of(checkpoint)
    result = evaluate(
        settings,
        data,
        checkpoints,
        device=configure(settings.runtime),
        run=folder,
        output=output or run or checkpoint.with_name(f"{checkpoint.stem}-evaluation"),
        ood=opening.open_other(settings, ood) if ood is not None else None,
        say=console.terminal,
    )
    return result, partial(show_evaluation, result)


def show_evaluation(figures: Mapping[str, Any]) -> None:
    """Print what `evaluate` returned: tables and paths on stdout, warnings on stderr."""
    from mbcd_cli.cli.printing import print_results

    print_results(figures, {name: Path(path) for name, path in figures["files"].items()})


def show_comparison(found: Mapping[str, Any]) -> None:
    """Print what `compare_runs` returned."""
    from mbcd_cli.cli.printing import print_comparison
    from mbcd_cli.evaluation.report.tables import from_values

    files = {name: Path(path) for name, path in found["files"].items() if not name.endswith((".csv", ".tex", ".png"))}
    print_comparison([from_values(table) for table in found["tables"]], files, found["warnings"])


def show_predicted(result: Mapping[str, Any]) -> None:
    """Print what `predict_new` returned."""
    console.table(
        f"{result['predicted']} of {result['clips']} clips predicted by the {result['model']} of checkpoint "
        f"{result['checkpoint']}",
        ("class", "clips"),
        [(name or "(no prediction)", count) for name, count in result["classes"].items()],
    )
    if result["accuracy"] is not None:
        console.table(
            f"Accuracy on the {result['labelled']} labelled clips (%)",
            ("head", "top-1", "mean class"),
            [
                (head, f"{100 * f['top1']:.1f}", f"{100 * f['mean_class_accuracy']:.1f}")
                for head, f in result["accuracy"].items()
            ],
        )
    for name, path in result["files"].items():
        console.out.print(f"{name}: {path}", markup=False)
    if result["exit_code"]:
        bad = len({r["clip"] for r in result["rejected"]})
        console.say(
            f"error: {bad} clips were rejected, and --max-bad allows {result['max_bad']}; the others are predicted.\n"
            f"Mend the files in the table above, or run again with --max-bad {bad}."
        )
