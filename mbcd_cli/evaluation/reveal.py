"""`mbcd reveal`: open the sealed targets of runs, once the look is written down in the ledger beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbcd_cli.checksums import of_file
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import FOREIGN, RunError
from mbcd_cli.evaluation.evaluate import checkpoint_checksums, evaluate, for_tables
from mbcd_cli.evaluation.report.results import Results, read_results
from mbcd_cli.evaluation.zero_shot import classify_again, reopened
from mbcd_cli.files import read_records, write_json
from mbcd_cli.ledger import REVEALED, LookedAt, looks, revealed_by, told, write_look
from mbcd_cli.resolved import load_settings
from mbcd_cli.runs import opening
from mbcd_cli.runs.checkpoint import Checkpoint
from mbcd_cli.runs.folder import DONE, SEALED, SETTINGS
from mbcd_cli.runs.names import is_zero_shot, run_checkpoints, runs_at, settings_key
from mbcd_cli.runtime import configure
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.clip_sets import TARGET, clip_sets
from mbcd_cli.scoring.deployed import evaluated_checkpoints
from mbcd_cli.settings import Settings


@dataclass(frozen=True, slots=True)
class RevealedRun:
    """A run's accuracy (0 to 1) on its target, of the deployed model."""

    run: str
    target: str
    top1: float


@dataclass(frozen=True, slots=True)
class Revealed:
    """What `reveal` opened, and folder of runs -> how often it was looked at, this look included."""

    runs: list[RevealedRun]
    ledgers: dict[str, str]


def reveal(paths: Sequence[Path], *, flags: Mapping[str, object], say: Say = SILENT) -> Revealed:
    """Write a look at these runs into the ledger of their folder; then tell their accuracies on the target.

    A run that was looked at before, and whose evaluation was interrupted, is evaluated without another look.

    Args:
        paths: run folders, folders of a sweep's tables (comparison.json names its runs), or folders of runs.
        flags: settings of where and how to compute, dotted name -> value.

    Raises:
        RunError: a run that is not complete, no run, or none that is sealed.
        FileError: a ledger that was changed: nothing is opened then.
    """
    folders = sorted({run for path in paths for run in runs_at(path)})
    sealed = [run for run in folders if load_settings(run / SETTINGS).dataset.seal_target]
    waiting = [run for run in sealed if not _is_open(run)]
    if not waiting:
        known = f" All {len(sealed)} that were are open." if sealed else ""
        raise RunError(
            f"No run of {', '.join(map(str, paths))} is sealed.{known}",
            "`mbcd evaluate --run RUN` tells of each, `mbcd sweep ... --collect` of all of a sweep.",
        )
    for run in waiting:
        if not (run / DONE).is_file():
            raise RunError(f"{run} is not trained to its end.", "Go on with it first; then reveal all of them at once.")
    looks_at = _written_down(waiting, " ".join(map(str, paths)), flags)
    revealed = [_revealed(run, looks_at[run], flags) for run in say.over(waiting, "revealing, runs")]
    return Revealed(revealed, {str(place): told(looks(place)) for place in sorted({run.parent for run in waiting})})


def _is_open(run: Path) -> bool:
    """Whether a run was revealed, and evaluated since."""
    if revealed_by(run) is None:
        return False
    try:
        return read_results(run / "results.json")["headline"]["clips"] == TARGET
    except (RunError, *FOREIGN):  # it is evaluated again
        return False


def _opened(run: Path, flags: Mapping[str, object]) -> tuple[Settings, Dataset, Mapping[str, Checkpoint]]:
    settings, dataset, checkpoints = opening.open_checkpoints(run_checkpoints(run), config=None, sets=(), flags=flags)
    if any(checkpoint.fingerprints != dataset.fingerprints for checkpoint in checkpoints.values()):
        raise RunError(f"{run} was trained on another cache than the one that is here.", "Name its with --cache-dir.")
    return settings, dataset, checkpoints


def _written_down(runs: Sequence[Path], what: str, flags: Mapping[str, object]) -> dict[Path, str]:
    """Run -> digest of the look at it; when this returns the ledgers of all folders have one of every run."""
    digests: dict[Path, str] = {}
    for place in sorted({run.parent for run in runs}):
        before = {at.run: look.digest for look in looks(place) for at in look.runs}
        here = [run for run in runs if run.parent == place]
        if new := [run for run in here if run.name not in before]:
            trained = sum(1 for _ in place.glob(f"*/{DONE}"))
            look = write_look(place, what, [_looked_at(run, flags) for run in new], trained=trained)
            before |= dict.fromkeys((run.name for run in new), look.digest)
        digests |= {run: before[run.name] for run in here}
    return digests


def _looked_at(run: Path, flags: Mapping[str, object]) -> LookedAt:
    if is_zero_shot(run):
        (settings, dataset), sums = reopened(run, flags), {SEALED: of_file(run / SEALED)}
    else:
        settings, dataset, checkpoints = _opened(run, flags)
        sums = checkpoint_checksums(run, checkpoints)
    return LookedAt(
        run=run.name,
        target=str(settings.training.target_domain),
        key=settings_key(settings),
        roots={name: cache.root_checksum for name, cache in dataset.caches.items()},
        checkpoints=sums,
    )


def _revealed(run: Path, look: str, flags: Mapping[str, object]) -> RevealedRun:
    told = reopened(run, flags) if is_zero_shot(run) else _opened(run, flags)
    epochs = _accuracies(run, *told[:2])
    write_json(run / REVEALED, {"look": look, "epochs": epochs}, place="--runs-dir")
    if is_zero_shot(run):
        return _told(run, classify_again(run, flags))
    dataset = told[1]
    settings, checkpoints = opening.load_checkpoints(run_checkpoints(run), config=None, sets=(), flags=flags)
    report = (run / "report.html").is_file()
    asked = settings.evaluation if report else for_tables(settings.evaluation)
    done = evaluate(
        settings.model_copy(update={"evaluation": asked}),
        dataset,
        evaluated_checkpoints(asked.checkpoints, checkpoints),
        device=configure(settings.runtime),
        run=run,
        output=run,
        pictures=report,
    )
    return _told(run, done.results)


def _told(run: Path, results: Results) -> RevealedRun:
    return RevealedRun(str(run), str(results.target_domain), results.headline.top1["fused"])


def _accuracies(run: Path, settings: Settings, dataset: Dataset) -> list[dict[str, object]]:
    """Per epoch what metrics.jsonl would hold as `target`, made of the classes that were said."""
    (target,) = [clip_set for clip_set in clip_sets(settings, dataset) if clip_set.name == TARGET]
    labels = dataset.clips.labels[target.clips]

    def head(classes: Sequence[int]) -> dict[str, float | None]:
        if len(classes) != len(labels):
            raise ValueError(f"an epoch has {len(classes)} classes for {len(labels)} clips")
        return {"accuracy": float(np.mean(np.asarray(classes) == labels)), "loss": None}

    def figures(said: Mapping[str, Any]) -> dict[str, object]:
        return {"fused": head(said["fused"]), "unimodal": {name: head(each) for name, each in said["unimodal"].items()}}

    try:
        return [
            {"epoch": record.pop("epoch"), "target": {name: figures(said) for name, said in record.items()}}
            for record in read_records(run / SEALED)
        ]
    except FOREIGN as error:
        raise RunError(f"{run / SEALED} is not what a training writes: {error}.", "Train that run again.") from error
