"""`mbcd train`: train on the source domains of a prepared dataset, into a run folder."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbcd_cli import console
from mbcd_cli.commands.online import attach_trunks
from mbcd_cli.data.loading import keep_on_device
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import Batch
from mbcd_cli.encoders import build_encoder
from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.evaluation.evaluator import clip_sets
from mbcd_cli.processes import ALONE, Group, joined
from mbcd_cli.randomness import seed_everything
from mbcd_cli.runtime import configure
from mbcd_cli.settings import Settings
from mbcd_cli.training.assemble import Training
from mbcd_cli.training.assemble import assemble as build_training
from mbcd_cli.training.feed import Feed
from mbcd_cli.training.plots import plot_run
from mbcd_cli.training.resume import Progress
from mbcd_cli.training.run_folder import RunFolder, open_run
from mbcd_cli.training.step import TrainStep
from mbcd_cli.training.trainer import Trainer


def train(settings: Settings, dataset: Dataset, *, run: Path, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Train into the run folder.

    Args:
        settings: with modalities and source domains resolved against the dataset (`common.open_for_training`).
        dataset: prepared, matching `settings` (`open_dataset`).
        run: the run folder.
        resume: go on with the run that is there; a finished one is left as it is.
        overwrite: replace the run that is there.

    Started by torchrun, all processes train together (`processes`); rank 0 alone writes and prints.

    Returns:
        What `done` holds: run, epochs, accuracies of best and last, seconds, steps per second, peak memory;
        nothing in processes other than rank 0.

    Raises:
        SettingsError, CacheError: domains, splits or sizes that the dataset does not have.
        RunError: the folder is in the way, or training had to stop (a signal, a non-finite loss, a full disk).
    """
    held_out = clip_sets(settings, dataset)
    training = settings.training
    clips = dataset.select(domains=training.source_domains, splits=("train",), limit=training.limit_clips)
    device = configure(settings.runtime)
    with (
        joined(device, say=console.say) as group,
        console.silent(not group.main),
        _run_folder(run, settings, resume=resume, overwrite=overwrite, group=group) as folder,
    ):
        if folder.resumed and folder.summary is not None:
            console.say(f"{run} is complete; nothing to resume.")
            return folder.summary if group.main else {}
        parts = assemble(settings, dataset, device=device, group=group)
        trainer = Trainer(
            settings=settings,
            dataset=dataset,
            step=parts.step,
            randomness=parts.randomness,
            clips=clips,
            held_out=held_out,
            run=folder,
            device=device,
            feed=_feed(settings, dataset, clips, [one.clips for one in held_out], device=device, group=group),
            run_step=parts.run_step,
            group=group,
        )
        started, first = time.monotonic(), trainer.progress.step
        try:
            progress = trainer.fit()
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"{device} is out of memory at batches of {training.batch_size} clips.",
                "Lower training.batch_size.",
            ) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise SettingsError(
                "training.batch_size: batch norm has no statistics in a batch of one clip.",
                "Raise it, or set training.batch_norm=frozen.",
            ) from error
        seconds = time.monotonic() - started
        summary = summarise(progress, settings=settings, run=run)
        memory = max(group.gathered(peak_memory_mb(device)))
        summary |= {
            "seconds": round(seconds, 3),
            "steps_per_second": round((progress.step - first) / max(seconds, 1e-9), 3),
            "peak_memory_mb": memory,
        }
        if group.world > 1:
            summary["processes"] = group.world

        def finish() -> dict[str, Any]:
            summary["plots"] = [
                str(path.relative_to(run)) for path in plot_run(run, parts.step.method.panels(settings.method))
            ]
            folder.finish(summary)
            return summary

        return group.on_main(finish) or {}


def _run_folder(run: Path, settings: Settings, *, resume: bool, overwrite: bool, group: Group) -> RunFolder:
    """Rank 0 holds the folder; the others only look into it."""
    folder = group.on_main(lambda: open_run(run, settings=settings, resume=resume, overwrite=overwrite))
    return folder or RunFolder(run, lock=None, resumed=resume)


def _feed(
    settings: Settings,
    dataset: Dataset,
    training: np.ndarray,
    testing: list[np.ndarray],
    *,
    device: torch.device,
    group: Group = ALONE,
) -> Feed:
    resident = None
    if dataset.caches:
        where = settings.runtime.cache_device
        resident = keep_on_device(dataset, where=where, training=training, testing=testing, device=device)
    read = None if resident is None else resident.read
    return Feed(dataset, device=device, ahead=settings.runtime.prefetch, read=read, group=group)


def assemble(settings: Settings, dataset: Dataset, *, device: torch.device, group: Group = ALONE) -> Training:
    """What the training consists of, all seeded by training.seed, on `device`."""
    seed_everything(settings.training.seed)
    attach_trunks(settings, dataset, device=device)
    return build_training(settings, dataset, device=device, group=group)


def summarise(progress: Progress, *, settings: Settings, run: Path) -> dict[str, Any]:
    """Accuracies of the best and the last epoch, and (labelled) of the epoch that happened to suit the target."""
    deployed = "student" if settings.average.kind == "none" else "teacher"
    history = progress.history

    def epoch(record: Mapping[str, Any]) -> dict[str, Any]:
        found = {"epoch": record["epoch"]}
        for where in ("validation", "target"):
            if where in record:
                figures = record[where][deployed]
                found[where] = figures["fused"]["accuracy"]
                found[f"{where}_unimodal"] = {k: v["accuracy"] for k, v in figures["unimodal"].items()}
        return found

    best = next(record for record in history if record["epoch"] == progress.best["epoch"])
    summary = {
        "run": str(run),
        "method": settings.method.name,
        "target_domain": settings.training.target_domain,
        "source_domains": list(settings.training.source_domains),
        "seed": settings.training.seed,
        "deployed": deployed,
        "epochs": len(history),
        "steps": progress.step,
        "best": epoch(best),
        "last": epoch(history[-1]),
        "warnings": list(progress.warnings.values()),
    }
    if "target" in history[-1]:
        oracle = max(history, key=lambda record: record["target"][deployed]["fused"]["accuracy"])
        summary["oracle"] = epoch(oracle) | {"note": "chosen on the target domain; never a result"}
    return summary


def peak_memory_mb(device: torch.device) -> float:
    """Most memory used so far: of the GPU on CUDA, else of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def dry_run(settings: Settings, dataset: Dataset) -> dict[str, Any]:
    """What a training would be like: shapes, parameters, sizes and the time of a step; nothing is written.

    Raises:
        SettingsError, CacheError: as `train`.
    """
    training = settings.training
    clips = dataset.select(domains=training.source_domains, splits=("train",), limit=training.limit_clips)
    device = configure(settings.runtime)
    step = assemble(settings, dataset, device=device).step
    size = min(training.batch_size, len(clips))
    batches = [
        batch.to(device)
        for _, batch in zip(
            range(3),
            dataset.batches(clips, batch_size=size, training=True, seed=training.seed, epoch=0, drop_last=True),
            strict=False,
        )
    ]
    seconds = _step_seconds(step, batches, device)
    steps = len(clips) // training.batch_size * training.epochs
    steps = min(steps, training.max_steps or steps)
    return {
        "dataset": dataset.name,
        "source_domains": list(training.source_domains),
        "target_domain": training.target_domain,
        "training_clips": len(clips),
        "held_out_clips": {one.name: len(one.clips) for one in clip_sets(settings, dataset)},
        "classes": dataset.classes,
        "device": str(device),
        "batch_size": training.batch_size,
        "shapes": {name: [list(part.shape[1:]) for part in parts] for name, parts in batches[0].inputs.items()},
        "parameters": _parameters(step, settings),
        "cache_bytes": dataset.nbytes,
        "step_seconds": round(seconds, 4),
        "steps": steps,
        "estimated_training_seconds": round(seconds * steps, 3),
        "peak_memory_mb": peak_memory_mb(device),
    }


def _step_seconds(step: TrainStep, batches: list[Batch], device: torch.device) -> float:
    """Mean seconds of two steps, after one that warms up."""
    step(batches[0])
    _wait(device)
    started = time.monotonic()
    for index in range(2):
        step(batches[(index + 1) % len(batches)])
    _wait(device)
    return (time.monotonic() - started) / 2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parameters(step: TrainStep, settings: Settings) -> dict[str, Any]:
    """Parameters by part: trained (tails, heads and the method's own) and frozen (trunks)."""
    model, own = step.model, step.method

    def count(module: torch.nn.Module, *, trained: bool = False) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

    frozen = {
        name: count(build_encoder(name, modality).cut(modality.cut)[0])
        for name, modality in settings.modalities.items()
    }
    tails = {name: count(model.tails[name]) for name in model.modalities}
    return {
        "trained": count(model, trained=True) + count(own, trained=True),
        "frozen": sum(frozen.values()),
        "tails": tails,
        "trunks": frozen,
        "unimodal_heads": count(model.heads),
        "fused_head": count(model.fused_head),
        "method": count(own, trained=True),
    }


def show(summary: Mapping[str, Any]) -> None:
    """Print what `train` returned and what to run next."""
    best, last, oracle = summary["best"], summary["last"], summary.get("oracle")
    heads = list(best["validation_unimodal"])
    rows = []
    for label, record in (("best (deployed)", best), ("last", last), ("oracle: chosen on the target", oracle)):
        if record is None:
            continue
        row = [label, record["epoch"], f"{100 * record['validation']:.1f}"]
        if "target" in record:
            unimodal = [f"{100 * record['target_unimodal'][head]:.1f}" for head in heads]
            row += [f"{100 * record['target']:.1f}", *unimodal]
        rows.append(row)
    target = summary["target_domain"]
    columns = ["epoch of the " + summary["deployed"], "epoch", "validation"]
    if target:
        columns += [f"{target} fused", *(f"{target} {head}" for head in heads)]
    console.table(f"Accuracy in percent: {summary['method']}, seed {summary['seed']}", columns, rows)
    console.say(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s ({summary['steps_per_second']:.1f}/s), "
        f"peak memory {summary['peak_memory_mb']:.0f} MB"
    )
    console.say(f"Next: mbcd evaluate --run {summary['run']}")
    console.say(f"      mbcd landscape --checkpoint {summary['run']}/checkpoints/best.pt")


def show_dry_run(plan: Mapping[str, Any]) -> None:
    """Print what `dry_run` returned."""
    parameters = plan["parameters"]
    rows = [
        (
            name,
            " + ".join("x".join(map(str, shape)) for shape in plan["shapes"][name]),
            parameters["tails"][name],
            parameters["trunks"][name],
        )
        for name in plan["shapes"]
    ]
    console.table(
        f"{plan['dataset']}: {plan['training_clips']} training clips of {', '.join(plan['source_domains'])}",
        ("modality", "shape at the cut", "trained in the tail", "frozen in the trunk"),
        rows,
    )
    cache = f"{plan['cache_bytes'] / 1e6:.0f} MB" if plan["cache_bytes"] is not None else "unknown"
    for line in (
        f"heads: {parameters['unimodal_heads']} uni-modal, {parameters['fused_head']} fused parameters; "
        f"the method's own: {parameters['method']}",
        f"trained {parameters['trained']}, frozen {parameters['frozen']} parameters; cache {cache}",
        f"{plan['steps']} steps of {plan['batch_size']} clips on {plan['device']}, {plan['step_seconds']:.3f} s each: "
        f"about {plan['estimated_training_seconds']:.0f} s without validation",
        f"peak memory {plan['peak_memory_mb']:.0f} MB",
    ):
        console.out.print(line, markup=False)
