"""`mbcd sweep`: flags, one library call, what it returned."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbcd_cli import console
from mbcd_cli.cli.evaluate import show_comparison
from mbcd_cli.cli.options import (
    Asked,
    DryRun,
    Jobs,
    Launcher,
    MethodNames,
    Output,
    RayAddress,
    Reply,
    RunsDir,
    Seeds,
    SlurmOptions,
    Targets,
    command,
    dataset_preset,
)
from mbcd_cli.files import size_text
from mbcd_cli.json_values import json_values

if TYPE_CHECKING:
    from mbcd_cli.evaluation.report.comparison import Comparison
    from mbcd_cli.sweep.estimate import SweepPlan
    from mbcd_cli.sweep.status import SweepStatus


@command(
    "dataset.name",
    "dataset.root",
    "training.chassis",
    preset=True,
    examples=(
        "mbcd sweep --preset av-digits --targets all --methods erm,mbcd --seeds 3",
        "mbcd sweep --preset epic-kitchens --table 1 --dry-run",
        "mbcd sweep --preset hac --table 1 --chassis published",
        "mbcd sweep --preset av-digits --grid average.beta=0.9,0.99",
        "mbcd sweep --preset av-digits --targets all --methods erm,mbcd --search 10",
    ),
)
def sweep(
    asked: Asked,
    table: Annotated[int | None, typer.Option("--table", help="One of the paper's tables, 1 to 5.")] = None,
    targets: Targets = None,
    methods: MethodNames = None,
    modality_sets: Annotated[
        str | None, typer.Option("--modality-sets", help="Sets of modalities: va,vf,vaf or video+audio,... .")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="multi-source (default), single-source or in-domain.")
    ] = None,
    seeds: Seeds = "3",
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="One axis over a setting: part.field=v1,v2; repeatable.")
    ] = None,
    search: Annotated[
        int | None,
        typer.Option("--search", help="Try the default and so many random configurations; report the best, anew."),
    ] = None,
    search_protocol: Annotated[
        str, typer.Option("--search-protocol", help="equal, or mmdg-bench: as the public benchmark searches.")
    ] = "equal",
    leave_one_source_out: Annotated[
        bool,
        typer.Option("--leave-one-source-out", help="Train each run without each source too, to study selection."),
    ] = False,
    dry_run: DryRun = False,
    status: Annotated[
        bool, typer.Option("--status", help="Only show how far the runs are, on whatever machines they run.")
    ] = False,
    collect: Annotated[bool, typer.Option("--collect", help="Only collect the runs that are done.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed runs again.")] = False,
    jobs: Jobs = 1,
    pack: Annotated[
        str, typer.Option("--pack", help="Runs that a process trains together: auto, off, or how many.")
    ] = "auto",
    launcher: Launcher = "local",
    slurm: SlurmOptions = None,
    slurm_tasks: Annotated[
        int | None, typer.Option("--slurm-tasks", help="Jobs that the runs are grouped into; default: one each.")
    ] = None,
    ray_address: RayAddress = None,
    runs_dir: RunsDir = Path("runs"),
    output: Output = None,
) -> Reply:
    """Run the grid of runs behind a table, then collect it: mean and spread over seeds, claims, curves.

    Runs that are done are never repeated, killed ones resume, failed ones are listed.

    With --root, what of the dataset is not prepared yet is prepared first.

    Without --output the tables go to a folder under sweeps.
    """
    from mbcd_cli.cli.board import Watch
    from mbcd_cli.launch.engines import Launching
    from mbcd_cli.sweep import sweep as sweeping
    from mbcd_cli.sweep.request import Request
    from mbcd_cli.sweep.status import SweepStatus as Status

    request = Request(
        table=table,
        targets=targets,
        methods=methods,
        modality_sets=modality_sets,
        protocol=protocol,
        seeds=seeds,
        grid=grid or (),
        search=search,
        search_protocol=search_protocol,
        leave_one_source_out=leave_one_source_out,
    )
    swept = sweeping.sweep(
        request,
        preset=dataset_preset(asked),
        config=asked.config,
        sets=asked.sets,
        flags=asked.flags,
        runs_dir=runs_dir,
        output=output,
        how=Launching(jobs, launcher, slurm or (), slurm_tasks, ray_address),
        pack=pack,
        retry_failed=retry_failed,
        dry_run=dry_run,
        status=status,
        collect=collect,
        watch=Watch,
        say=console.terminal,
    )
    if not isinstance(swept, sweeping.Swept):
        return swept, partial(show_status if isinstance(swept, Status) else show_plan, swept)
    show = partial(show_sweep, swept.comparison)
    failure = sweeping.report_failures(swept.outcome)
    if failure is not None:
        if not asked.as_json:
            show()
        raise failure
    return {**json_values(swept.outcome), **json_values(swept.comparison)}, show


def show_plan(plan: SweepPlan) -> None:
    """Print what a dry run returned."""
    title, told = f"{len(plan.cells)} runs", "method, modalities, domains"
    if plan.trials:
        console.table(title, (told, "trials", "then"), plan.trials)
        console.table(
            "what is searched",
            ("setting", "range", "methods"),
            [(row.setting, f"{row.low:g} to {row.high:g}", ", ".join(row.methods)) for row in plan.searched],
        )
    else:
        rows = [(Path(cell.run).name.rsplit("-", 1)[-1], cell.name) for cell in plan.cells]
        console.table(title, ("run", f"{told}, seed"), rows)
    if plan.populations:
        rows = [
            (
                one.methods[0] if len(one.methods) == 1 else f"{one.methods[0]} and {len(one.methods) - 1} more",
                "+".join(one.modalities),
                *(one.runs, one.processes, one.width, size_text(one.memory_bytes)),
            )
            for one in plan.populations
        ]
        columns = ("method", "modalities", "runs", "processes", "at a time", "memory of each")
        console.table("trained together", columns, rows)
    states = ", ".join(f"{number} {name}" for name, number in sorted(plan.states.items()))
    time_text = "time not known" if plan.seconds is None else f"about {console.duration(plan.seconds)}"
    disk = "disk not known" if plan.disk_bytes is None else f"about {size_text(plan.disk_bytes)} of disk"
    for line in (
        f"{states}.",
        f"Left: {plan.left} runs, {plan.jobs} at a time: {time_text} ({plan.basis}); {disk}.",
    ):
        console.show(line)


def show_status(status: SweepStatus) -> None:
    """Print how far a sweep is."""
    if status.running:
        rows = [
            (run.name, run.host, f"{run.epochs}/{run.of}", "" if run.seconds is None else console.duration(run.seconds))
            for run in status.running
        ]
        console.table("running", ("run", "where", "epoch", "for"), rows)
    for run in status.failed:
        console.show(f"failed: {run.name}: {run.error.splitlines()[0]} ({run.run}.log)")
        for line in run.log:
            console.show(f"  | {line}")
    queued = f" ({status.queued} with a job of the cluster)" if status.queued else ""
    console.show(
        f"{status.done} of {status.total} runs done, {len(status.running)} running, {status.waiting} waiting{queued}, "
        f"{len(status.failed)} failed."
    )
    if status.per_hour and status.seconds_left:
        end = time.strftime("%a %H:%M", time.localtime(time.time() + status.seconds_left))
        console.show(f"{status.per_hour:.3g} runs an hour: {console.duration(status.seconds_left)} left, until {end}.")


def show_sweep(done: Comparison) -> None:
    """Print what `collect` returned; a table whose rows a joint one has already is in the files only."""
    from mbcd_cli.evaluation.report.score_tables import unrepeated

    show_comparison(replace(done, tables=unrepeated(done.tables)))
