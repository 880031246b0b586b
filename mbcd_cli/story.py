"""`mbcd demo`: the whole story on the embedded dataset, ending with a table, pictures and what to try next."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.readers.demo_content import DOMAINS
from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.evaluation.evaluate import Evaluation, evaluate
from mbcd_cli.evaluation.report.results import Results
from mbcd_cli.landscape import measure
from mbcd_cli.landscape.measure import Landscape
from mbcd_cli.naming import did_you_mean
from mbcd_cli.preparation import prepare
from mbcd_cli.preparation.answer import PreparedModality
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


@dataclass(frozen=True, slots=True)
class Story:
    """What `demo` returns.

    Attributes:
        runs: method -> run folder.
        target_accuracy, source_accuracy: method -> head -> top-1 (0 to 1) of the deployed model.
        landscape: figures around both methods' checkpoints.
        files: reports and pictures to look at.
        seconds: of every stage. prepared: modality -> what `prepare` says of it.
    """

    directory: Path
    target_domain: str | None
    modalities: list[str]
    runs: dict[str, Path]
    target_accuracy: dict[str, dict[str, float]]
    source_accuracy: dict[str, dict[str, float]]
    landscape: Landscape
    files: list[Path]
    seconds: dict[str, float]
    prepared: dict[str, PreparedModality]


def demo(
    directory: Path,
    *,
    flags: Mapping[str, object],
    say: Say = SILENT,
) -> Story:
    """Prepare, train ERM and MBCD, evaluate both and compare their landscapes, all under `directory`.

    What an earlier demo left is used again: media, cache and finished trainings with the same settings.

    Args:
        directory: the folder of it all.
        flags: settings to use, dotted name -> value.
        say: told every stage.

    Raises:
        RunError: `directory` is a file. SettingsError: the demo has no such target domain.
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
    machine = {path: value for path, value in flags.items() if path.startswith(("cache.", "runtime."))}
    torch_device = configure(settings["mbcd"].runtime)
    seconds: dict[str, float] = {}

    say(f"1/4 prepare: the demo's media and cache, in {directory}")
    started = time.monotonic()
    prepared = prepare.prepare(settings["mbcd"], say=say)
    seconds["prepare"] = time.monotonic() - started

    runs: dict[str, Path] = {}
    evaluations: dict[str, Evaluation] = {}
    for method in COMPARED:
        resolved, dataset = open_for_training(settings[method])
        runs[method] = directory / "runs" / run_name(resolved)
        say(f"2/4 train {method}: target {resolved.training.target_domain}")
        started = time.monotonic()
        _train(resolved, dataset, runs[method], say)
        seconds[f"train {method}"] = time.monotonic() - started

    opened = {}
    for method in COMPARED:
        opened[method] = open_checkpoints(run_checkpoints(runs[method]), config=None, sets=(), flags=machine)
    say("3/4 landscape: both methods on one scale")
    started = time.monotonic()
    resolved, dataset, _ = opened[COMPARED[-1]]
    best = [(method, checkpoints[deployed_checkpoint(checkpoints)]) for method, (_, _, checkpoints) in opened.items()]
    surveyed = measure.landscape(resolved, dataset, best, output=directory / "landscape", device=torch_device, say=say)
    seconds["landscape"] = time.monotonic() - started

    for method, (resolved, dataset, checkpoints) in opened.items():
        say(f"4/4 evaluate {method}")
        started = time.monotonic()
        where = {"run": runs[method], "output": runs[method], "landscape": directory / "landscape"}
        evaluations[method] = evaluate(resolved, dataset, checkpoints, device=torch_device, **where, say=say)
        seconds[f"evaluate {method}"] = time.monotonic() - started

    return Story(
        directory=directory,
        target_domain=resolved.training.target_domain,
        modalities=list(resolved.model.modalities),
        runs=runs,
        target_accuracy={method: done.results.headline.top1 for method, done in evaluations.items()},
        source_accuracy={method: _source_accuracy(done.results) for method, done in evaluations.items()},
        landscape=surveyed.figures,
        files=[
            *(done.files[key] for done in evaluations.values() for key in PICTURES if key in done.files),
            *(path for path in surveyed.files.values() if path.suffix == ".png"),
        ],
        seconds={stage: round(value, 1) for stage, value in seconds.items()},
        prepared=prepared.modalities,
    )


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


def _source_accuracy(results: Results) -> dict[str, float]:
    return {head: figures.top1 for head, figures in results.deployed_sets["source"].items()}
