"""Commands in this process, as a user or a script runs them; a home that four of them have lived in."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import helpers
from typer.testing import CliRunner, Result

from mbcd_cli.cli import app
from mbcd_cli.preparation.prepare import prepare
from mbcd_cli.resolved import resolve
from mbcd_cli.settings import Settings

CUTS = ("modalities.video.cut=layer3", "cache.random_weights=true")
"""Settings with which the video has a trunk, and its cache a `tail.pt`."""
SECONDS = int(os.environ.get("PATIENCE", "60"))
"""After which a command on a tiny home has hung; a busy machine needs more."""
DRAWS = int(os.environ.get("DRAWS", "10000"))
"""Examples that a fuzz test draws at most, under `-m stress`."""
CODES = (0, 1, 2, 3, 130)
LONGEST = 20_000
"""Characters of the longest message."""


def run(*arguments: object, code: int = 0) -> Result:
    """Run `mbcd` in this process; the result has stdout, stderr and, with --json, `.data`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="mbcd")
    assert result.exit_code == code, f"exit {result.exit_code}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    assert "Unexpected" not in result.stderr
    result.data = json.loads(result.stdout) if "--json" in arguments else None
    return result


def tried(arguments: list[str], environ: Mapping[str, str] | None = None) -> Result:
    """Run `mbcd` with whatever this is: it ends in time, as documented, with one message where something is wrong."""
    with within(SECONDS, arguments):
        result = CliRunner().invoke(app, arguments, prog_name="mbcd", env=environ)
    told = f"{arguments} {environ or ''}\nexit {result.exit_code}\n{result.stdout}\n{result.stderr}"
    assert result.exception is None or isinstance(result.exception, SystemExit), f"{result.exception!r}\n{told}"
    assert result.exit_code in CODES, told
    assert "Unexpected" not in result.stderr, told
    assert "Traceback" not in result.stderr, told
    assert len(result.stderr) < LONGEST, told
    assert "\x1b" not in result.stderr, told
    errors = [line for line in result.stderr.splitlines() if re.match(r"error( in process \d+)?: ", line)]
    if result.exit_code == 2 and not errors:
        assert "Error" in result.stderr, told
    elif result.exit_code and "--json" in arguments and not errors:  # what was found is the answer
        assert json.loads(result.stdout)["exit_code"] == result.exit_code, told
    elif result.exit_code:
        assert len(errors) == 1, told
        assert len(result.stderr[result.stderr.index(errors[0]) :]) > 10, told  # a name may hold a line's end
    else:
        assert not errors, told
    if "--json" in arguments and (errors or not result.exit_code) and not (environ or {}).get("RANK"):
        json.loads(result.stdout)
    return result


@contextmanager
def within(seconds: int, what: object):
    """What does not end within so many seconds has hung."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done within {seconds} s: {what}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def settings_for(root: Path, cache: Path, *sets: str) -> Settings:
    """The settings of the home's dataset."""
    return resolve(sets=[*helpers.SMALL, *CUTS, *sets], flags={"dataset.root": root, "cache.dir": cache})


def make_home(home: Path) -> Path:
    """Media (`tiny`), their `cache` (one modality behind a trunk), a finished and evaluated `run`, a `landscape`."""
    root = helpers.write_dataset(home / "tiny", domains=("alpha", "beta", "gamma"))
    prepare(settings_for(root, home / "cache"))
    sets = [part for one in (*helpers.SMALL, *CUTS, "training.batch_size=4") for part in ("--set", one)]
    run(
        *("train", "--dataset", "tiny", "--target-domain", "gamma", "--cache-dir", home / "cache"),
        *("--run", home / "run", "--epochs", 2, *sets),
    )
    run("evaluate", "--run", home / "run")
    run(
        *("landscape", "--checkpoint", home / "run/checkpoints/best.pt", "--output", home / "landscape"),
        *("--set", "landscape.points=3", "--set", "landscape.analyses=['surface']"),
    )
    return home
