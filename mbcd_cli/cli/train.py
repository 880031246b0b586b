"""`mbcd train`: flags, one library call, what it returned."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.options import (
    Asked,
    DryRun,
    Overwrite,
    Reply,
    RunPath,
    RunsDir,
    command,
    dataset_preset,
    emit_settings,
)
from mbcd_cli.errors import UsageError

if TYPE_CHECKING:
    from mbcd_cli.training.dry_run import TrainingPlan
    from mbcd_cli.training.train import TrainingSummary

_TRAINS = [
    "training.target_domain",
    "training.source_domains",
    "method.name",
    "training.chassis",
    "model.modalities",
    "dataset.name",
    "training.epochs",
    "training.batch_size",
    "optimizer.lr",
    "training.seed",
    "training.limit_clips",
    "training.max_steps",
]


@command(
    *_TRAINS,
    preset=True,
    show_settings=True,
    examples=(
        "mbcd train --preset av-digits --target-domain street",
        "mbcd train --preset av-digits --target-domain street --method erm --seed 1",
        "mbcd train --preset hac --target-domain cartoon --method cmrf --chassis published",
        "mbcd train --target-domain D2 --modalities video,audio",
    ),
)
def train(
    asked: Asked,
    show_settings: bool = False,
    dry_run: DryRun = False,
    run: RunPath = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Overwrite = False,
) -> Reply | None:
    """Train on the source domains from the cache; the target is only reported.

    Without --preset, --config or --dataset the preset is epic-kitchens.

    Without --run the run folder is named after method, modalities, target and seed.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other.", "Use one of them.")
    preset = dataset_preset(asked)
    if not show_settings:
        asked.look_up(preset)
    settings = asked.resolve(preset, named=True)
    if show_settings:
        return emit_settings(settings, as_json=asked.as_json)
    if dry_run:
        from mbcd_cli.training.dry_run import dry_run_of_prepared

        plan = dry_run_of_prepared(settings, say=console.terminal)
        return plan, partial(show_dry_run, plan)
    from mbcd_cli.training.train import train_prepared

    result = train_prepared(
        settings, run=run, runs_dir=runs_dir, resume=resume, overwrite=overwrite, say=console.terminal
    )
    return None if result is None else (result, partial(show_training, result))  # under torchrun rank 0 alone reports


def show_training(summary: TrainingSummary) -> None:
    """Print what `train` returned and what to run next."""
    target, heads = summary.target_domain, list(summary.best.validation_unimodal)
    rows = []
    for label, epoch in (
        ("best", summary.best),
        ("last", summary.last),
        ("oracle: chosen on the target", summary.oracle),
    ):
        if epoch is None:
            continue
        label += " (deployed)" if label == summary.tested else ""
        row = [label, epoch.epoch, f"{100 * epoch.validation:.1f}"]
        if target:
            of_heads = epoch.target_unimodal or {}
            figures = [epoch.target, *(of_heads.get(head) for head in heads)]
            row += ["" if figure is None else f"{100 * figure:.1f}" for figure in figures]
        rows.append(row)
    columns = [f"epoch of the {summary.deployed}", "epoch", "validation"]
    if target:
        columns += [f"{target} fused", *(f"{target} {head}" for head in heads)]
    console.table(f"Accuracy in percent: {summary.method}, seed {summary.seed}", columns, rows)
    console.say(
        f"{summary.steps} steps in {summary.seconds:.0f} s ({summary.steps_per_second:.1f}/s), "
        f"peak memory {summary.peak_memory_mb:.0f} MB"
    )
    console.say(f"Next: mbcd evaluate --run {shlex.quote(summary.run)}")
    console.say(f"      mbcd landscape --checkpoint {shlex.quote(summary.run + '/checkpoints/best.pt')}")


def show_dry_run(plan: TrainingPlan) -> None:
    """Print what `dry_run` returned."""
    parameters = plan.parameters
    rows = [
        (
            name,
            " + ".join("x".join(map(str, shape)) for shape in shapes),
            parameters.tails[name],
            parameters.trunks[name],
        )
        for name, shapes in plan.shapes.items()
    ]
    console.table(
        f"{plan.dataset}: {plan.training_clips} training clips of {', '.join(plan.source_domains)}",
        ("modality", "shape at the cut", "trained in the tail", "frozen in the trunk"),
        rows,
    )
    cache = f"{plan.cache_bytes / 1e6:.0f} MB" if plan.cache_bytes is not None else "unknown"
    for line in (
        f"heads: {parameters.unimodal_heads} uni-modal, {parameters.fused_head} fused parameters; "
        f"the method's own: {parameters.method}",
        f"trained {parameters.trained}, frozen {parameters.frozen} parameters; cache {cache}",
        f"{plan.steps} steps of {plan.batch_size} clips on {plan.device}, {plan.step_seconds:.3f} s each: "
        f"about {plan.estimated_training_seconds:.0f} s without validation",
        *_layouts(plan),
        f"peak memory {plan.peak_memory_mb:.0f} MB",
    ):
        console.show(line)


def _layouts(plan: TrainingPlan) -> Iterator[str]:
    """The layouts of convolutions that were timed, and what to do where the other one is quicker."""
    if plan.layout_seconds:
        (taken, seconds), (other, others) = plan.layout_seconds.items()
        yield f"runtime.channels_last: {taken}, which auto takes, {seconds:.3f} s a step; {other} {others:.3f} s"
        if others < 0.95 * seconds:
            yield f"Add --set runtime.channels_last={other} to all runs of a study; they keep it."
