"""`mbcd evaluate` as one call, from files: measure a run, predict new clips with it, or compare runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mbcd_cli.evaluation.evaluate import Evaluation, evaluate
from mbcd_cli.evaluation.new_data import Predicted, predict_new
from mbcd_cli.evaluation.report.comparison import Comparison, compare_runs
from mbcd_cli.runs import opening
from mbcd_cli.runs.names import run_checkpoints, run_of
from mbcd_cli.runtime import configure
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.deployed import evaluated_checkpoints


def evaluate_requested(
    *,
    run: Path | None = None,
    checkpoint: Path | None = None,
    runs: Sequence[str] | None = None,
    ood: Path | None = None,
    output: Path | None = None,
    data_root: Path | None = None,
    manifest: Path | None = None,
    max_bad: str = "0",
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object],
    say: Say = SILENT,
) -> Evaluation | Predicted | Comparison:
    """Do what is asked.

    Args:
        run, checkpoint, runs: one of them: a run folder, a checkpoint's file, or patterns of evaluated runs to compare.
        ood: cache folder of another dataset, for out-of-distribution detection.
        output: folder for what is written; None: the run, `CHECKPOINT-evaluation`, `predict-NAME` or `comparison`.
        data_root, manifest: new clips, which are predicted where one of them is given. max_bad: of `predict_new`.
        config, sets, flags: settings over those of the training, as `opening.load_checkpoints` takes them.
        say: told how far it is.

    Raises:
        MbcdError: what is named is not there, or does not fit.
    """
    if runs is not None:
        return compare_runs(runs, output=output or Path("comparison"))
    files = run_checkpoints(run) if run is not None else {checkpoint.stem: checkpoint}
    layers = {"config": config, "sets": sets, "flags": flags}
    if data_root is not None or manifest is not None:
        settings, checkpoints = opening.load_checkpoints(files, **layers)
        if run is not None:
            checkpoints = evaluated_checkpoints(settings.evaluation.checkpoints, checkpoints)
        return predict_new(
            settings,
            checkpoints,
            root=data_root,
            manifest=manifest,
            cache_dir=flags.get("cache.dir"),
            output=output,
            device=configure(settings.runtime),
            max_bad=max_bad,
            say=say,
        )
    settings, dataset, checkpoints = opening.open_checkpoints(files, **layers)
    if run is not None:
        checkpoints = evaluated_checkpoints(settings.evaluation.checkpoints, checkpoints)
    return evaluate(
        settings,
        dataset,
        checkpoints,
        device=configure(settings.runtime),
        run=run or run_of(checkpoint),
        output=output or run or checkpoint.with_name(f"{checkpoint.stem}-evaluation"),
        ood=opening.open_other(settings, ood) if ood is not None else None,
        say=say,
    )
