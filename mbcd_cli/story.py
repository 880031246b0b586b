"""`mbcd demo`: the whole story on the embedded dataset, ending with a table, pictures and what to try next."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.readers.demo_content import DOMAINS
from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.evaluation import evaluate
from mbcd_cli.landscape import measure
from mbcd_cli.naming import did_you_mean
from mbcd_cli.preparation import prepare
from mbcd_cli.resolved import changed, load_settings, resolve
from mbcd_cli.runs.folder import DONE, SETTINGS
from mbcd_cli.runs.names import run_checkpoints, run_name
from mbcd_cli.runs.opening import open_checkpoints, open_for_training
from mbcd_cli.runtime import configure
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.deployed import deployed_checkpoint
from mbcd_cli.settings import Settings
from mbcd_cli.training import train

COMPARED = ("erm", "mbcd")
PICTURES = ("report", "accuracy per epoch", "confusion on target")
"""What `evaluate` writes that the demo points at; the report shows the rest."""


def demo(
    directory: Path,
    *,
    flags: Mapping[str, object],
    say: Say = SILENT,
) -> dict[str, Any]:
    """Prepare, train ERM and MBCD, evaluate both and compare their landscapes, all under `directory`.

    What an earlier demo left is used again: media, cache and finished trainings with the same settings.

    Args:
        directory: the folder of it all.
        flags: settings to use, dotted name -> value.
        say: told every stage.

    Returns:
        A JSON-able summary: target and in-domain accuracy per method and head, files, seconds per stage.
    """
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file.", "Name another folder with --dir.")
    flags = {**flags, "dataset.root": directory / "media", "cache.dir": directory / "cache"}
    settings = {m: resolve(preset="demo", environ=os.environ, method=m, flags=flags) for m in COMPARED}
    target = settings["mbcd"].training.target_domain
    if target is not None and target not in DOMAINS:  # told before minutes of generating and preparing
        raise SettingsError(
            f"The demo has no domain {target!r}.",
            f"{did_you_mean(target, DOMAINS)}Its domains are {', '.join(DOMAINS)}.",
        )
    here = {path: value for path, value in flags.items() if path.startswith(("cache.", "runtime."))}
    torch_device = configure(settings["mbcd"].runtime)
    seconds: dict[str, float] = {}

    say(f"1/4 prepare: the demo's media and cache, in {directory}")
    started = time.monotonic()
    prepared = prepare.prepare(settings["mbcd"], say=say)
    seconds["prepare"] = time.monotonic() - started

    runs: dict[str, Path] = {}
    results: dict[str, Any] = {}
    for method in COMPARED:
        resolved, dataset = open_for_training(settings[method])
        runs[method] = directory / "runs" / run_name(resolved)
        say(f"2/4 train {method}: target {resolved.training.target_domain}")
        started = time.monotonic()
        _train(resolved, dataset, runs[method], say)
        seconds[f"train {method}"] = time.monotonic() - started

    opened = {}
    for method in COMPARED:
        opened[method] = open_checkpoints(run_checkpoints(runs[method]), config=None, sets=(), flags=here)
    say("3/4 landscape: both methods on one scale")
    started = time.monotonic()
    resolved, dataset, _ = opened[COMPARED[-1]]
    best = [(method, found[deployed_checkpoint(found)]) for method, (_, _, found) in opened.items()]
    surfaces = measure.landscape(resolved, dataset, best, output=directory / "landscape", device=torch_device, say=say)
    seconds["landscape"] = time.monotonic() - started

    for method, (resolved, dataset, found) in opened.items():
        say(f"4/4 evaluate {method}")
        started = time.monotonic()
        where = {"run": runs[method], "output": runs[method], "landscape": directory / "landscape"}
        results[method] = evaluate.evaluate(resolved, dataset, found, device=torch_device, **where, say=say)
        seconds[f"evaluate {method}"] = time.monotonic() - started

    return {
        "directory": str(directory),
        "target_domain": resolved.training.target_domain,
        "modalities": list(resolved.model.modalities),
        "runs": {method: str(path) for method, path in runs.items()},
        "target_accuracy": {m: results[m]["headline"]["top1"] for m in COMPARED},
        "source_accuracy": {m: _source_accuracy(results[m]) for m in COMPARED},
        "landscape": surfaces,
        "files": [
            *(results[m]["files"][key] for m in COMPARED for key in PICTURES if key in results[m]["files"]),
            *(path for path in surfaces["files"].values() if str(path).endswith(".png")),
        ],
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "prepared": {name: asdict(modality) for name, modality in prepared.modalities.items()},
    }


def _train(settings: Settings, dataset: Dataset, run: Path, say: Say) -> None:
    """Train, or keep the finished run of the same settings; an interrupted one goes on."""
    same = False
    if (run / SETTINGS).is_file():
        same = not changed(load_settings(run / SETTINGS), settings)
    if same and (run / DONE).is_file():
        say(f"  {run} is trained already; delete it to train again.")
        return
    resume = same and (run / "checkpoints" / "last.pt").is_file()
    train.train(settings, dataset, run=run, resume=resume, overwrite=not resume, say=say)


def _source_accuracy(result: dict[str, Any]) -> dict[str, float]:
    headline = result["headline"]
    heads = result["models"][headline["checkpoint"]][headline["model"]]["source"]
    return {head: figures["top1"] for head, figures in heads.items()}
