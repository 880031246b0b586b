"""Cells of a sweep that are trained together, as one population in one process; `sweep.packing` says which."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.errors import MbcdError, StoppedError
from mbcd_cli.evaluation.evaluate import evaluate, for_tables
from mbcd_cli.launch.unit import DONE_CODE, FAILED_CODE, STOPPED_CODE, beside, forget_failure, known, write_failure
from mbcd_cli.launch.warm import end_with_owner
from mbcd_cli.locks import lock
from mbcd_cli.resolved import load_settings
from mbcd_cli.runs.folder import DONE
from mbcd_cli.runs.names import run_checkpoints
from mbcd_cli.runs.opening import load_checkpoints, open_for_training
from mbcd_cli.runtime import configure
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.deployed import evaluated_checkpoints
from mbcd_cli.sweep.state import state
from mbcd_cli.training.together import Outcome, Wanted, train_together


def run_pack(folders: Sequence[Path], *, threads: int, width: int | None, say: Say = SILENT) -> int:
    """Train and evaluate the cells of these run folders, whatever of it is done already; the exit code.

    What became of each is told by its folder and the files beside it (`state`); the log lies beside the first.
    """
    held: dict[Path, ExitStack] = {}
    wanted: list[Wanted] = []
    stopped = False
    dataset: Dataset | None = None

    def ended(one: Wanted, outcome: Outcome) -> None:
        nonlocal stopped
        with held.pop(one.run):
            if isinstance(outcome, Exception):
                if isinstance(outcome, StoppedError):
                    stopped = True
                    return
                _failed(one.run, outcome, say)
                return
            try:
                _evaluate(one, dataset, say)
                forget_failure(one.run)
            except Exception as error:
                _failed(one.run, error, say)

    for folder in folders:
        with ExitStack() as opened:
            mine = lock(beside(folder, "lock"), place="--runs-dir")
            if mine is None:
                continue
            opened.enter_context(mine)
            if state(folder) == "done" or beside(folder, "failed").is_file():
                continue
            try:
                settings = load_settings(beside(folder, "toml"))
                runtime = settings.runtime.model_copy(update={"threads": threads})
                settings = settings.model_copy(update={"runtime": runtime})
                if dataset is None:
                    settings, dataset = open_for_training(settings)
                else:
                    settings, _ = open_for_training(settings, dataset)
            except Exception as error:
                _failed(folder, error, say)
                continue
            opened.enter_context(known(mine))
            wanted.append(Wanted(settings, folder))
            held[folder] = opened.pop_all()
    if dataset is not None:
        try:
            train_together(wanted, dataset, width=width, ended=ended, say=say)
            stopped = stopped or bool(held)  # some did not begin
        except Exception as error:
            for folder, locks in held.items():
                with locks:
                    _failed(folder, error, say)
    if stopped:
        return STOPPED_CODE
    return DONE_CODE if all(state(folder) == "done" for folder in folders) else FAILED_CODE


def _failed(folder: Path, error: Exception, say: Say) -> None:
    if not isinstance(error, MbcdError):
        say("".join(traceback.format_exception(error)).rstrip())
    say(f"error: {folder.name}: {error}")
    write_failure(folder, error)


def _evaluate(one: Wanted, dataset: Dataset, say: Say) -> None:
    """As the cell's settings say, but for the report and what is only drawn: `mbcd evaluate` makes those."""
    assert (one.run / DONE).is_file()
    settings, checkpoints = load_checkpoints(run_checkpoints(one.run), config=None, sets=(), flags={})
    asked = for_tables(one.settings.evaluation)
    settings = settings.model_copy(update={"evaluation": asked, "runtime": one.settings.runtime})
    chosen = evaluated_checkpoints(settings.evaluation.checkpoints, checkpoints)
    evaluate(settings, dataset, chosen, device=configure(settings.runtime), run=one.run, output=one.run, pictures=False)


def serve_pack(arguments: Sequence[str], say: Say) -> int:
    """The process of a population: THREADS, WIDTH (0: as many as are quick), RUN_FOLDER, ...; the exit code."""
    threads, width, *folders = arguments
    end_with_owner()
    return run_pack([Path(folder) for folder in folders], threads=int(threads), width=int(width) or None, say=say)
