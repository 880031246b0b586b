"""`mbcd demo`: the whole story on the embedded dataset, ending with a table, pictures and what to try next."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from mbcd_cli import console
from mbcd_cli.commands import common, evaluate, landscape, prepare, train
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import RunError
from mbcd_cli.layers import load_settings, resolve
from mbcd_cli.runtime import configure
from mbcd_cli.settings import Settings
from mbcd_cli.training.run_folder import DONE, SETTINGS

METHODS = ("erm", "mbcd")
PICTURES = ("report", "accuracy per epoch", "confusion on target")
"""What `evaluate` writes that the demo points at; the report shows the rest."""


def demo(
    directory: Path,
    *,
    target_domain: str | None,
    seed: int,
    epochs: int | None,
    device: str | None,
    threads: int | None,
) -> dict[str, Any]:
    """Prepare, train ERM and MBCD, evaluate both and compare their landscapes, all under `directory`.

    What an earlier demo left is used again: media, cache and finished trainings with the same settings.

    Returns:
        A JSON-able summary: target and in-domain accuracy per method and head, files, seconds per stage.
    """
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file.", "Name another folder with --dir.")
    flags = {
        "dataset.root": directory / "media",
        "cache.dir": directory / "cache",
        "training.target_domain": target_domain,
        "training.seed": seed,
        "training.epochs": epochs,
        "runtime.device": device,
        "runtime.threads": threads,
    }
    settings = {m: resolve(preset="demo", environ=os.environ, method=m, flags=flags) for m in METHODS}
    torch_device = configure(settings["mbcd"].runtime)
    seconds: dict[str, float] = {}

    console.say(f"1/4 prepare: the demo's media and cache, in {directory}")
    started = time.monotonic()
    prepared = prepare.prepare(settings["mbcd"])
    seconds["prepare"] = time.monotonic() - started

    runs: dict[str, Path] = {}
    results: dict[str, Any] = {}
    checkpoints = {}
    for method in METHODS:
        resolved, dataset = common.open_for_training(settings[method])
        runs[method] = directory / "runs" / common.run_name(resolved)
        console.say(f"2/4 train {method}: target {resolved.training.target_domain}")
        started = time.monotonic()
        _train(resolved, dataset, runs[method])
        seconds[f"train {method}"] = time.monotonic() - started

    for method in METHODS:
        console.say(f"3/4 evaluate {method}")
        started = time.monotonic()
        files = common.run_checkpoints(runs[method])
        opened, dataset, found = common.open_checkpoints(
            files, config=None, sets=(), cache_dir=directory / "cache", device=device, threads=threads
        )
        results[method] = evaluate.evaluate(
            opened, dataset, found, device=torch_device, run=runs[method], output=runs[method]
        )
        checkpoints[method] = found["best"]
        seconds[f"evaluate {method}"] = time.monotonic() - started

    console.say("4/4 landscape: both methods on one scale")
    started = time.monotonic()
    surfaces = landscape.landscape(
        opened, dataset, list(checkpoints.items()), output=directory / "landscape", device=torch_device
    )
    seconds["landscape"] = time.monotonic() - started
    return {
        "directory": str(directory),
        "target_domain": opened.training.target_domain,
        "modalities": list(opened.model.modalities),
        "runs": {method: str(path) for method, path in runs.items()},
        "target_accuracy": {m: results[m]["headline"]["top1"] for m in METHODS},
        "source_accuracy": {m: _source_accuracy(results[m]) for m in METHODS},
        "landscape": surfaces,
        "files": [
            *(results[m]["files"][key] for m in METHODS for key in PICTURES if key in results[m]["files"]),
            *(path for path in surfaces["files"].values() if str(path).endswith(".png")),
        ],
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "prepared": prepared["modalities"],
    }


def _train(settings: Settings, dataset: Dataset, run: Path) -> None:
    """Train, or keep the finished run of the same settings; an interrupted one goes on."""
    same = False
    if (run / SETTINGS).is_file():
        saved = load_settings(run / SETTINGS)
        same = all(
            getattr(saved, part) == getattr(settings, part)
            for part in ("modalities", "model", "method", "average", "optimizer", "training", "dataset")
        )
    if same and (run / DONE).is_file():
        console.say(f"  {run} is trained already; delete it to train again.")
        return
    resume = same and (run / "checkpoints" / "last.pt").is_file()
    train.train(settings, dataset, run=run, resume=resume, overwrite=not resume)


def _source_accuracy(result: dict[str, Any]) -> dict[str, float]:
    headline = result["headline"]
    heads = result["models"][headline["checkpoint"]][headline["model"]]["source"]
    return {head: figures["top1"] for head, figures in heads.items()}


def show(result: dict[str, Any]) -> None:
    """Print the table, the pictures and the next commands."""
    heads = ["fused", *result["modalities"]]
    rows = []
    for where, key in ((f"target {result['target_domain']} (unseen)", "target"), ("sources (held out)", "source")):
        for method in METHODS:
            accuracy = result[f"{key}_accuracy"][method]
            rows.append((f"{method.upper()}, {where}", *(f"{100 * accuracy[head]:.1f}" for head in heads)))
    console.table("Accuracy in percent", ("method, domain", *heads), rows)
    console.out.print("Reports and pictures:")
    for file in result["files"]:
        console.out.print(f"  {file}", markup=False)
    total = sum(result["seconds"].values())
    folder = result["directory"]
    console.out.print(f"\nDone in {total:.0f} s. Next:")
    for line in (
        f"mbcd evaluate --run {result['runs']['mbcd']} --cache-dir {folder}/cache",
        f"mbcd landscape --checkpoint {result['runs']['mbcd']}/checkpoints/best.pt --cache-dir {folder}/cache",
        f"mbcd train --preset demo --cache-dir {folder}/cache --method ema",
        "mbcd prepare manifest --root YOUR_DATASET      (docs/data.md says what it needs)",
    ):
        console.out.print(f"  {line}", markup=False)
