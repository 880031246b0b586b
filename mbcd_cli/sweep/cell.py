"""One cell of a sweep in a process of its own.

It reads `RUN_FOLDER.toml`, trains (or goes on) and evaluates into RUN_FOLDER. Exit codes are those of `launch.unit`;
what it says goes to the log that stands for its stderr.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from mbcd_cli.errors import BusyError, MbcdError, StoppedError
from mbcd_cli.evaluation import evaluate
from mbcd_cli.launch.unit import (
    BUSY_CODE,
    DONE_CODE,
    FAILED_CODE,
    STOPPED_CODE,
    beside,
    forget_failure,
    known,
    write_failure,
)
from mbcd_cli.launch.warm import end_with_owner
from mbcd_cli.locks import lock
from mbcd_cli.resolved import load_settings
from mbcd_cli.runs.folder import DONE, SETTINGS
from mbcd_cli.runs.names import run_checkpoints
from mbcd_cli.runs.opening import open_checkpoints, open_for_training
from mbcd_cli.runtime import configure
from mbcd_cli.say import SILENT, Say
from mbcd_cli.scoring.deployed import evaluated_checkpoints
from mbcd_cli.sweep.state import state
from mbcd_cli.training import train


def run_cell(folder: Path, *, threads: int, say: Say = SILENT) -> int:
    """Train and evaluate the cell of this run folder, whatever of it is done already; the exit code."""
    held = lock(beside(folder, "lock"), place="--runs-dir")
    if held is None:
        return BUSY_CODE
    with held, known(held):
        if state(folder) == "done":
            return DONE_CODE
        try:
            _train(folder, threads=threads, say=say)
            _evaluate(folder, threads=threads, say=say)
        except (KeyboardInterrupt, StoppedError):
            return STOPPED_CODE
        except BusyError:  # `mbcd train` in this very folder
            return BUSY_CODE
        except Exception as error:
            say(f"error: {error}" if isinstance(error, MbcdError) else traceback.format_exc())
            write_failure(folder, error)
            return FAILED_CODE
        forget_failure(folder)
    return DONE_CODE


def _train(folder: Path, *, threads: int, say: Say) -> None:
    if (folder / DONE).is_file():
        return
    settings = load_settings(beside(folder, "toml"))
    runtime = settings.runtime.model_copy(update={"threads": threads})
    settings = settings.model_copy(update={"runtime": runtime})
    configure(runtime)
    settings, data = open_for_training(settings)
    train.train(settings, data, run=folder, resume=(folder / SETTINGS).is_file(), overwrite=False, say=say)


def _evaluate(folder: Path, *, threads: int, say: Say) -> None:
    asked = load_settings(beside(folder, "toml"))
    settings, data, checkpoints = open_checkpoints(
        run_checkpoints(folder),
        config=None,
        sets=(),
        flags={"cache.dir": asked.cache.dir, "runtime.device": asked.runtime.device, "runtime.threads": threads},
    )
    settings = settings.model_copy(update={"evaluation": asked.evaluation})
    wanted = evaluated_checkpoints(settings.evaluation.checkpoints, checkpoints)
    evaluate.evaluate(
        settings,
        data,
        wanted,
        device=configure(settings.runtime),
        run=folder,
        output=folder,
        pictures=asked.evaluation.report,  # for tables alone nothing is drawn
        say=say,
    )


def serve_cell(arguments: Sequence[str], say: Say) -> int:
    """The process of a cell: RUN_FOLDER, THREADS; the exit code."""
    end_with_owner()
    return run_cell(Path(arguments[0]), threads=int(arguments[1]), say=say)
