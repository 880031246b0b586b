"""What a method, encoder or reader promises, tried one at a time: what holds, in how many seconds, where to look."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mbcd_cli.errors import MbcdError


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise that was tried.

    Attributes:
        name, promise: of it, in a word and in a sentence.
        why: what did not hold; empty where it holds.
        where: FILE:LINE to look at; empty where it holds.
    """

    name: str
    promise: str
    holds: bool
    seconds: float
    why: str = ""
    where: str = ""


def tried(checks: Mapping[str, Callable[[], None]], *, of: object, told: Mapping[str, str]) -> Iterator[Promise]:
    """Run every check; one that raises is a promise that is not kept.

    Args:
        of: the class or function that is checked: a line of its file is the one to look at.
        told: name -> the promise in a sentence.
    """
    for name, check in checks.items():
        started = time.perf_counter()
        why = where = ""
        try:
            check()
        except Exception as error:  # whatever somebody's code raises
            where = _where(error, of)
            why = str(error) if isinstance(error, AssertionError | MbcdError) else f"{type(error).__name__}: {error}"
        yield Promise(name, told[name], not where, round(time.perf_counter() - started, 3), why, where)


def _where(error: Exception, of: object) -> str:
    """The innermost line of the file that `of` stands in, of those that the error came through; else the first of what
    it computes."""
    functions = [of]
    if isinstance(of, type):
        functions = [*(vars(of).get(name) for name in ("losses", "gradients")), *vars(of).values()]
    code = next((code for one in functions if (code := getattr(one, "__code__", None)) is not None), None)
    if code is None:
        return f"{of!r}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(code.co_filename)]
    return f"{code.co_filename}:{lines[-1] if lines else code.co_firstlineno}"
