"""How a command ends: its result emitted or shown, errors as one message and an exit code."""

from __future__ import annotations

import errno
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, MappingProxyType

import typer

from mbcd_cli import console
from mbcd_cli.errors import MbcdError, SettingsError
from mbcd_cli.json_values import json_values
from mbcd_cli.place import this_process
from mbcd_cli.say import SILENT


@contextmanager
def outcome(*, as_json: bool, debug: bool) -> Iterator[None]:
    """Errors become one message and an exit code: 1 the user's to mend, 3 too many rejected clips.

    A scheduler's SIGTERM, and a terminal that closes, are answered like Ctrl-C, so that helper processes and shared
    memory go too.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # nohup
            signal.signal(ending, interrupt)
    try:
        with warnings.catch_warnings():
            if not debug:  # one line each, as all that is said
                warn = console.warn if _rank() == 0 else SILENT.warn
                warnings.showwarning = lambda message, *_, **__: warn(str(message))
            try:
                yield
            except Exception as error:
                if interrupted:  # in the midst of torch or HDF5, which make an error of their own of it
                    raise KeyboardInterrupt from error
                raise
    except MbcdError as error:
        if debug:
            raise
        _fail(str(error), error.message, error.remedy, as_json=as_json, details=error.details)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        console.say("Interrupted.")
        raise typer.Exit(130) from error
    except BrokenPipeError as error:  # `mbcd ... | head` is no error
        raise typer.Exit(0) from error
    except (typer.Exit, SystemExit):
        raise
    except (OSError, MemoryError) as error:
        if debug:
            raise
        _refuse(*_of_the_machine(error), as_json=as_json)
        raise typer.Exit(1) from error
    except Exception as error:
        if debug:
            raise
        if str(error).startswith("Symlink loop"):  # of `Path.resolve`, before Python 3.13
            _refuse(*_of_the_machine(OSError(errno.ELOOP, str(error))), as_json=as_json)
            raise typer.Exit(1) from error
        if "allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError":  # torch's
            _refuse(*_of_the_machine(MemoryError()), as_json=as_json)
            raise typer.Exit(1) from error
        _refuse(*_of_the_code(error), as_json=as_json)
        raise typer.Exit(1) from error


def _of_the_code(error: Exception) -> tuple[str, str]:
    """What is wrong with a plug-in, or a file with a method; or with us; and what to do."""
    from mbcd_cli.plugins import line_of_theirs

    what = f"{type(error).__name__}: {error}"
    if line := line_of_theirs(error):
        return f"{line}: {what}", "Mend it: --debug shows how it came there, and `mbcd check` tries it on tiny inputs."
    return f"Unexpected {what}", "Run the command again with --debug and report what it shows."


def _of_the_machine(error: OSError | MemoryError) -> tuple[str, str]:
    """What is wrong with the machine or its files, and what to do."""
    if isinstance(error, MemoryError):
        return "There is not enough memory.", "Ask for less: smaller batches, smaller sizes, fewer clips."
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}.", "Check that path, this user's rights there, and the disk."


def _refuse(message: str, remedy: str, *, as_json: bool) -> None:
    _fail(f"{message}\n{remedy}", message, remedy, as_json=as_json)


def _fail(
    text: str, message: str, remedy: str, *, as_json: bool, details: Mapping[str, object] = MappingProxyType({})
) -> None:
    rank = _rank()
    console.say(f"error{f' in process {rank}' if rank else ''}: {text}")
    if as_json and not rank:
        console.emit_json(json_values({"error": message, "remedy": remedy, **details}))


def _rank() -> int:
    """0 where the environment is wrong about it, which may be what the error is about."""
    try:
        return this_process().rank
    except SettingsError:
        return 0


def finish(result: object, show: Callable[[], None], *, as_json: bool) -> None:
    """Emit a result as JSON or show it; its `exit_code`, where it has one, ends the command."""
    values = json_values(result)
    if as_json:
        console.emit_json(values)
    else:
        show()
    if isinstance(values, dict) and values.get("exit_code"):
        raise typer.Exit(values["exit_code"])
